"""The fleet's store: whatever happens in whatever order, a job ends once and its result stays."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from frugal.kernels.errors import FrugalError
from frugal.servers.fleet import store as s
from frugal.servers.fleet import store_check
from frugal.servers.fleet.job_request import order
from frugal.servers.fleet.token import kept

GRAPH = b'{"1": {"class_type": "EmptyImage", "inputs": {"color": %d}}}'
LIMIT = 4


def an_order(color: int = 0, **files: bytes):
    return order(GRAPH % color, files)


class Life(RuleBasedStateMachine):
    """The model: what each job's client was told, which must stay true."""

    jobs = Bundle("jobs")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="frugal-store-"))
        self.store = s.Store(self.folder, patience=0)
        self.status: dict[str, str] = {}
        self.result: dict[str, bytes] = {}
        self.keys: dict[str, tuple[str, int]] = {}
        self.attempts: dict[str, int] = {}

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    def is_open(self, job):
        return self.status.get(job) in s.OPEN

    @rule(target=jobs, key=st.sampled_from(["", "a", "b", "c"]), color=st.integers(0, 1))
    def add(self, key, color):
        opened = sum(self.is_open(job) for job in self.status)
        try:
            job, new = self.store.add(an_order(color, x=b"in"), key, LIMIT)
        except s.KeyReusedError:
            assert key and self.keys[key][1] != color
            return "none"
        except s.FullError:
            assert opened == LIMIT and key not in self.keys
            return "none"
        assert new == (key not in self.keys)
        if new:
            assert opened < LIMIT
            self.status[job.id], self.attempts[job.id] = s.QUEUED, 0
            if key:
                self.keys[key] = job.id, color
        else:
            assert self.keys[key] == (job.id, color)
        return job.id

    @rule(job=jobs)
    def start(self, job):
        if job in self.status:
            number = self.store.start(job, "w")
            if self.is_open(job):
                self.status[job] = s.RUNNING
                self.attempts[job] += 1
            assert number == self.attempts[job]

    @rule(job=jobs)
    def requeue(self, job):
        if job in self.status:
            self.store.requeue(job, "lost")
            if self.is_open(job):
                self.status[job] = s.QUEUED

    @rule(job=jobs, data=st.binary(max_size=3), whole=st.booleans())
    def complete(self, job, data, whole):
        if job not in self.status:
            return
        if not self.is_open(job):
            # What a worker that was thought dead hands in late.
            late = self.folder / "late"
            late.mkdir()
            (late / "out.png").write_bytes(b"late")
            assert not self.store.complete(job, late, {})
            return
        place = self.store.attempt_folder(job)
        (place / "sub").mkdir()
        (place / "sub" / "out.png").write_bytes(data)
        if whole:
            assert self.store.complete(job, place, {"1": {"text": ["x"]}})
            self.status[job], self.result[job] = s.COMPLETED, data

    @rule(job=jobs, status=st.sampled_from([s.FAILED, s.CANCELLED]))
    def fail(self, job, status):
        if job in self.status:
            assert self.store.fail(job, "why", status) == self.is_open(job)
            if self.is_open(job):
                self.status[job] = status

    @rule(job=jobs)
    def delete(self, job):
        if job not in self.status:
            with pytest.raises(KeyError):
                self.store.delete(job)
        elif self.is_open(job):
            with pytest.raises(FrugalError, match="has not ended"):
                self.store.delete(job)
        else:
            self.store.delete(job)
            del self.status[job]
            self.result.pop(job, None)
            self.keys = {key: told for key, told in self.keys.items() if told[0] != job}

    @rule()
    def restart(self):
        self.store.close()
        self.store = s.Store(self.folder, patience=0)
        running = [job for job, status in self.status.items() if status == s.RUNNING]
        assert self.store.recover() == len(running)
        self.status |= dict.fromkeys(running, s.QUEUED)

    @invariant()
    def all_is_as_told(self):
        assert {job.id: job.status for job in self.store.list(limit=10**6)} == self.status
        assert set(self.store.waiting()) == {j for j, t in self.status.items() if t == s.QUEUED}
        assert self.store.open_jobs() == sum(map(self.is_open, self.status))
        assert {path.name for path in self.store.jobs.iterdir()} == set(self.status)
        for job, data in self.result.items():
            assert self.store.file(job, "sub/out.png").read_bytes() == data
        for job in filter(self.is_open, self.status):
            assert self.store.order(job).files == {"x": b"in"}


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_a_store_belongs_to_one_fleet(tmp_path):
    first = s.Store(tmp_path)
    with pytest.raises(FrugalError, match="another fleet uses the store"):
        s.Store(tmp_path, patience=0)
    first.close()
    s.Store(tmp_path, patience=0).close()


def test_half_an_order_is_swept_away(tmp_path):
    s.Store(tmp_path).close()
    (tmp_path / "jobs" / ("0" * 32) / "input").mkdir(parents=True)
    held = s.Store(tmp_path)
    assert not list(held.jobs.iterdir()) and held.open_jobs() == 0
    held.close()


def test_what_the_store_did_not_make_stays(tmp_path):
    """A folder named by mistake is refused; links and strange folders in a store are left alone."""
    (tmp_path / "mine" / "jobs").mkdir(parents=True)
    (tmp_path / "mine" / "jobs" / "thesis.txt").write_text("x")
    with pytest.raises(FrugalError, match="name an empty folder"):
        s.Store(tmp_path / "mine")
    assert (tmp_path / "mine" / "jobs" / "thesis.txt").read_text() == "x"
    held = s.Store(tmp_path / "store")
    (held.jobs / "holiday").mkdir()
    (held.jobs / ("a" * 32)).symlink_to(tmp_path / "mine", target_is_directory=True)
    held.close()
    s.Store(tmp_path / "store").close()
    assert {each.name for each in held.jobs.iterdir()} == {"holiday", "a" * 32}
    assert (tmp_path / "mine" / "jobs" / "thesis.txt").read_text() == "x"


def test_what_a_fleet_writes_before_its_first_job_is_no_stranger(tmp_path):
    kept(tmp_path / "token")
    (tmp_path / "work").mkdir()
    s.Store(tmp_path).close()


def test_a_lost_index_loses_no_result(tmp_path):
    held = s.Store(tmp_path)
    job, deleted = (held.add(an_order(color), "", 9)[0].id for color in (0, 1))
    for each in (job, deleted):
        folder = held.attempt_folder(each)
        (folder / "a.png").write_bytes(b"a")
        held.complete(each, folder, {})
    held.delete(deleted)
    held.close()
    for index in tmp_path.glob("index.sqlite*"):
        index.unlink()
    held = s.Store(tmp_path)
    (found,) = held.list()
    assert found.id == job and found.status == s.COMPLETED and "the index" in found.notes[0]
    assert held.file(job, "a.png").read_bytes() == b"a"
    held.close()


def test_a_deletion_that_was_broken_off_is_finished(tmp_path, monkeypatch):
    held = s.Store(tmp_path)
    job = held.add(an_order(), "", 9)[0].id
    folder = held.attempt_folder(job)
    (folder / "a.png").write_bytes(b"a")
    held.complete(job, folder, {})
    (held.jobs / job).rename(held.jobs / f"deleted-{job}")
    held.close()
    held = s.Store(tmp_path)
    assert held.list() == [] and not list(held.jobs.iterdir())
    held.close()


def test_results_are_found_by_listed_name_only(tmp_path):
    held = s.Store(tmp_path)
    job = held.add(an_order(), "", 1)[0].id
    folder = held.attempt_folder(job)
    (folder / "a.png").write_bytes(b"a")
    held.complete(job, folder, {})
    assert held.file(job, "a.png").read_bytes() == b"a"
    for name in ("../workflow.json", "/etc/passwd", "b.png", ""):
        with pytest.raises(KeyError):
            held.file(job, name)
    with pytest.raises(KeyError):
        held.job("../" + job)
    held.close()


def test_old_results_expire_by_the_time_that_the_fleet_was_up(tmp_path, monkeypatch):
    held = s.Store(tmp_path)
    old, new = (held.add(an_order(color), "", 9)[0].id for color in (0, 1))
    held.fail(old, "why")
    now = s.time.monotonic()
    monkeypatch.setattr(s.time, "monotonic", lambda: now + 100)
    held.fail(new, "why")
    assert held.expire(200) == 0
    held.close()
    # What was counted before a restart counts on, and a wrong time of day does not count.
    monkeypatch.setattr(s.time, "time", lambda: 4e9)
    held = s.Store(tmp_path)
    assert held.expire(150) == 0 and held.expire(50) == 1
    assert [job.id for job in held.list()] == [new]
    held.close()


def test_counters_that_are_only_noted_are_written_at_the_end(tmp_path):
    held = s.Store(tmp_path)
    held.note("refused_token")
    held.note("refused_token")
    assert held.counters() == {"refused_token": 2}
    assert held._base.execute("SELECT COUNT(*) FROM counts").fetchone() == (0,)
    held.close()
    held = s.Store(tmp_path)
    assert held.counters() == {"refused_token": 2}
    held.close()


def test_a_deleted_lock_file_lets_no_second_fleet_in(tmp_path):
    held = s.Store(tmp_path)
    (tmp_path / s.LOCK).unlink()
    with pytest.raises(FrugalError, match="another fleet uses the store"):
        s.Store(tmp_path, patience=0)
    held.close()
    s.Store(tmp_path, patience=0).close()


def test_an_index_of_an_earlier_version_is_taken_over(tmp_path):
    held = s.Store(tmp_path)
    job = held.add(an_order(), "k", 9)[0].id
    held.fail(job, "why")
    held.close()
    base = sqlite3.connect(tmp_path / s.INDEX)
    base.execute("ALTER TABLE jobs DROP COLUMN clock")
    base.execute("DROP TABLE clock")
    base.commit()
    base.close()
    held = s.Store(tmp_path)
    assert held.job(job).error == "why" and held.expire(1000) == 0
    held.close()


def a_result(held: s.Store, content: bytes) -> str:
    job = held.add(an_order(), "", 9)[0].id
    folder = held.attempt_folder(job)
    (folder / "a.png").write_bytes(content)
    held.start(job, "w")
    assert held.complete(job, folder, {})
    return job


def test_a_store_is_checked_and_repaired(tmp_path):
    held = s.Store(tmp_path)
    whole, cut = (a_result(held, content) for content in (b"whole", b"to be cut"))
    with pytest.raises(FrugalError, match="stop the fleet first"):
        store_check.check(tmp_path, repair=False)
    held.close()
    assert store_check.check(tmp_path, repair=False) == []
    (tmp_path / "jobs" / cut / s.OUTPUT / "a.png").write_bytes(b"cut")
    for repair in (False, True):
        (line,) = store_check.check(tmp_path, repair)
        assert cut in line and "has 3 bytes; expected 9" in line
    assert store_check.check(tmp_path, repair=False) == []
    held = s.Store(tmp_path)
    assert held.job(cut).status == s.FAILED and held.job(cut).error == store_check.GONE
    assert held.job(whole).status == s.COMPLETED
    held.close()


def test_a_damaged_index_is_named_with_its_repair_and_built_anew(tmp_path):
    held = s.Store(tmp_path)
    job = a_result(held, b"kept")
    held.close()
    index = tmp_path / s.INDEX
    index.write_bytes(b"no database" + index.read_bytes()[11:])
    with pytest.raises(FrugalError, match=r"^run python -m frugal.fleet check --repair --store"):
        s.Store(tmp_path, patience=0)
    assert "damaged" in store_check.check(tmp_path, repair=False)[0]
    assert len(store_check.check(tmp_path, repair=True)) == 2
    held = s.Store(tmp_path, patience=0)
    assert held.file(job, "a.png").read_bytes() == b"kept"
    held.close()
    assert [each.name for each in tmp_path.glob("*.damaged-*")]


@pytest.mark.parametrize(
    ("workflow", "told"),
    [
        (b"", "the workflow is no JSON"),
        (b"[" * 10**5, "the workflow is no JSON"),
        (b"NaN", "the workflow is no JSON"),
        (b"{}", "a workflow without nodes"),
        (b'{"nodes": [], "links": []}', r"as the web page saves it; expected the API form"),
        (b'{"1": {"inputs": {}}}', "node '1' of the workflow"),
        (b'{"1": {"class_type": "A"}}', "node '1' of the workflow"),
        (b'{"1": {"class_type": "A", "inputs": {"x": ["2", 0]}}}', "'x' of node '1' is linked to"),
        (b'{"1": {"class_type": "A", "inputs": {"x": ["1", -1]}}}', "output -1 of node '1'"),
        (b'{"1": {"class_type": "A", "inputs": {"x": ["1", 0.5]}}}', "output 0.5 of node '1'"),
        (b'{"1": {"class_type": "A", "inputs": {"x": ["1", true]}}}', "output True of node '1'"),
    ],
)
def test_refused_workflows(workflow, told):
    with pytest.raises(FrugalError, match=told):
        order(workflow, {})


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a.png", "a/b.png", "a\\b.png", ".hidden", "C:x", "a\0.png", "x" * 300],
)
def test_refused_file_names(name):
    with pytest.raises(FrugalError, match="an input file called"):
        order(GRAPH % 0, {name: b""})


def test_two_names_that_are_one_on_some_systems():
    with pytest.raises(FrugalError, match="two input files"):
        order(GRAPH % 0, {"a.png": b"", "A.PNG": b""})


@pytest.mark.parametrize(
    "plan",
    [b"x", b"[]", *(b'{"totals": %b}' % t for t in (b"{}", b'{"a": 1.5}', b'{"a": -1}'))],
)
def test_refused_plans(plan):
    with pytest.raises(FrugalError, match="plan"):
        order(GRAPH % 0, {}, plan)


def test_what_makes_orders_different():
    one = an_order(0, a=b"1", b=b"2")
    assert one.digest() == an_order(0, b=b"2", a=b"1").digest()
    others = [an_order(1, a=b"1", b=b"2"), an_order(0, a=b"2", b=b"1"), an_order(0, a=b"12", b=b"")]
    assert len({one.digest(), *(other.digest() for other in others)}) == 4
