"""The scheduler with pretended workers: retries, limits, cancelling, going on after a restart."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3

import pytest

pytest.importorskip("starlette")
from frugal.servers.fleet import scheduler as d
from frugal.servers.fleet.job_request import order
from frugal.servers.fleet.store import FullError, KeyReusedError, Store
from frugal.tests.helpers.fleet import (
    MEMORY,
    Pretended,
    an_order,
    complains,
    dies,
    hangs,
    is_lost_before,
    picture_graph,
    started,
    works,
)
from frugal.tests.helpers.patience import comes


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(d, "PAUSE", 0.001)
    monkeypatch.setattr(d, "LONGEST_PAUSE", 0.002)


def with_scheduler(folder, body, *acts, **rules):
    """Run `body(scheduler, pretended)` at a scheduler of its own."""

    async def main():
        pretended = Pretended([*acts])
        scheduler = d.JobScheduler(Store(folder, patience=0), pretended.run, d.Rules(**rules))
        scheduler.open()
        try:
            return await body(scheduler, pretended)
        finally:
            await scheduler.close()

    return asyncio.run(main())


async def ended(scheduler, *jobs):
    """Those jobs when they have ended."""

    def found():
        return [scheduler.store.job(job) for job in jobs]

    await comes(lambda: all(job.status in d.ENDED for job in found()), found)
    return found()


def test_a_result_is_put_together_from_its_pieces(tmp_path):
    async def body(scheduler, pretended):
        job, new = scheduler.accept(an_order(42))
        assert new
        (done,) = await ended(scheduler, job.id)
        assert done.status == "completed" and done.attempts == 1 and done.worker == "w1"
        assert done.files == [{"name": "empty.txt", "bytes": 0}, {"name": "out/p.txt", "bytes": 2}]
        assert scheduler.store.file(job.id, "out/p.txt").read_bytes() == b"42"
        assert done.shown == {"2": {"text": ["x"]}} and scheduler.memory == MEMORY
        assert scheduler.store.counters() == {"accepted": 1, "completed": 1}

    with_scheduler(tmp_path, body, works)


def test_a_lost_worker_costs_nothing_but_time(tmp_path):
    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order(7))
        (done,) = await ended(scheduler, job.id)
        assert done.status == "completed" and done.attempts == 3
        assert scheduler.store.file(job.id, "out/p.txt").read_bytes() == b"7"
        assert done.notes == [
            f"attempt {n} on w1: RuntimeError: the card fell off the bus" for n in (1, 2)
        ]
        assert not list((scheduler.store.jobs / job.id).glob("attempt-*"))
        assert scheduler.store.counters()["workers_lost"] == 2

    with_scheduler(tmp_path, body, dies, dies, works)


def test_a_job_that_kills_every_worker_is_given_up(tmp_path):
    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "failed" and done.attempts == 3 == len(pretended.begun)
        assert "lost in each of 3 attempts, at last with RuntimeError: the card" in done.error
        assert done.files == []

    with_scheduler(tmp_path, body, dies, attempts=3)


def test_a_worker_lost_before_the_start_is_no_attempt(tmp_path):
    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "completed" and done.attempts == 1 and len(pretended.begun) == 9

    with_scheduler(tmp_path, body, *[is_lost_before] * 8, works, attempts=1)


def test_no_worker_for_too_long(tmp_path):
    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "failed" and done.attempts == 0
        assert "no worker began with it within 0.02 s, at last ConnectionError" in done.error

    with_scheduler(tmp_path, body, is_lost_before, wait_seconds=0.02)


def test_a_worker_that_says_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(d, "GRACE", 0.02)

    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "failed" and done.attempts == 2 and "TimeoutError" in done.error

    with_scheduler(tmp_path, body, hangs, attempts=2, job_seconds=0.02)


def test_a_graph_that_fails_is_not_tried_again(tmp_path):
    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert (done.status, done.error) == ("failed", "node 1 (EmptyImage): no")
        assert len(pretended.begun) == 1

    with_scheduler(tmp_path, body, complains)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b"])
def test_a_worker_cannot_write_elsewhere(tmp_path, name):
    async def sends(job, wanted):
        yield started()
        yield {"kind": "file", "name": name, "data": b"x"}
        yield {"kind": "done", "shown": {}}

    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "failed" and "a worker sent a file called" in done.error

    with_scheduler(tmp_path / "store", body, sends, attempts=1)
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


ODD = ("12:30 cat?.png", "12:30 cat*.png", "a\\b.png", "\0.png", "\ud800.png", "\u732b" * 200)


def test_odd_names_of_results_are_kept_apart(tmp_path):
    """`%date:hh-mm%` in a prefix, or a name too long for a disk, costs no picture."""

    async def sends(job, wanted):
        yield started()
        for name in ODD:
            for half in (name[:1], name[1:]):
                data = half.encode("utf-8", "surrogatepass")
                yield {"kind": "file", "name": name, "data": data}
        yield {"kind": "done", "shown": {}}

    async def body(scheduler, pretended):
        job, _ = scheduler.accept(an_order())
        (done,) = await ended(scheduler, job.id)
        assert done.status == "completed" and done.attempts == 1
        names = [each["name"] for each in done.files]
        assert len(names) == len(ODD) and all(len(name.encode()) < 255 for name in names)
        held = {scheduler.store.file(job.id, name).read_bytes() for name in names}
        assert held == {name.encode("utf-8", "surrogatepass") for name in ODD}

    with_scheduler(tmp_path, body, sends, attempts=1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), sqlite3.OperationalError("full")])
@pytest.mark.parametrize("call", ["start", "requeue", "count", "attempt_folder", "complete"])
def test_a_full_disk_is_waited_for(tmp_path, monkeypatch, error, call):
    """Whatever call of the store finds the disk full, the job goes on when there is room again."""
    monkeypatch.setattr(d, "PAUSE", 0.001)
    left = [3]

    async def body(scheduler, pretended):
        real = getattr(scheduler.store, call)

        def full(*args, **more):
            if left[0] and (call != "count" or args[0] != "accepted"):
                left[0] -= 1
                raise error
            return real(*args, **more)

        monkeypatch.setattr(scheduler.store, call, full)
        job, _ = scheduler.accept(an_order(5))
        (done,) = await ended(scheduler, job.id)
        assert done.status == "completed" and not left[0]
        assert scheduler.store.file(job.id, "out/p.txt").read_bytes() == b"5"

    with_scheduler(tmp_path, body, dies, dies, dies, dies, works, attempts=9)


def test_a_key_is_one_job_and_one_result(tmp_path):
    async def body(scheduler, pretended):
        told = [scheduler.accept(an_order(1), "k") for _ in range(5)]
        assert [new for _, new in told] == [True, False, False, False, False]
        await ended(scheduler, told[0][0].id)
        assert not scheduler.accept(an_order(1), "k")[1] and len(pretended.begun) == 1
        with pytest.raises(KeyReusedError):
            scheduler.accept(an_order(2), "k")
        assert scheduler.store.counters()["accepted"] == 1

    with_scheduler(tmp_path, body, works)


def test_a_full_queue_refuses_and_a_known_key_does_not_count(tmp_path):
    async def body(scheduler, pretended):
        first = scheduler.accept(an_order(0), "k")[0]
        scheduler.accept(an_order(1))
        with pytest.raises(FullError, match="2 jobs wait or run"):
            scheduler.accept(an_order(2))
        assert not scheduler.accept(an_order(0), "k")[1]
        assert await scheduler.cancel(first.id)
        scheduler.accept(an_order(2))
        assert scheduler.store.counters()["refused_full"] == 1

    with_scheduler(tmp_path, body, hangs, queue=2)


def test_cancel_stops_the_worker(tmp_path):
    stopped = []

    async def slow(job, wanted):
        try:
            async for event in hangs(job, wanted):
                yield event
        finally:
            stopped.append(job)

    async def body(scheduler, pretended):
        job = scheduler.accept(an_order())[0].id
        await comes(lambda: scheduler.store.job(job).status == "running")
        assert await scheduler.cancel(job) and not await scheduler.cancel(job)
        await comes(lambda: stopped == [job])
        assert scheduler.store.job(job).error == "cancelled by request"
        with pytest.raises(KeyError):
            await scheduler.cancel("unknown")

    with_scheduler(tmp_path, body, slow)


def test_orders_wait_on_disk_until_their_turn(tmp_path):
    inside, most, gate = [], [], asyncio.Event()

    async def gated(job, wanted):
        inside.append(job)
        most.append(len(inside))
        await gate.wait()
        inside.remove(job)
        async for event in works(job, wanted):
            yield event

    async def body(scheduler, pretended):
        jobs = [scheduler.accept(an_order(color))[0].id for color in range(6)]
        await comes(lambda: len(inside) >= 2)
        await scheduler.cancel(jobs[5])
        gate.set()
        await ended(scheduler, *jobs)
        assert [job for job, _ in pretended.begun] == jobs[:5] and max(most) == 2

    with_scheduler(tmp_path, body, gated, at_once=2)


def plan(size: int) -> bytes:
    return json.dumps({"totals": {"sample": size, "decode": 5}}).encode()


def test_a_plan_is_held_against_the_worker(tmp_path):
    def planned(size):
        return order(json.dumps(picture_graph()), {}, plan(size))

    async def body(scheduler, pretended):
        with pytest.raises(d.NotYetError):
            scheduler.accept(planned(1))
        await ended(scheduler, scheduler.accept(an_order())[0].id)
        with pytest.raises(d.TooLargeError, match=r"needs 8\.00 GB and a worker has 8\.00 GB"):
            scheduler.accept(planned(MEMORY + 1))
        job = scheduler.accept(planned(MEMORY))[0]
        assert job.needs == MEMORY
        await ended(scheduler, job.id)
        scheduler.seen("small", MEMORY // 2)
        with pytest.raises(d.TooLargeError):
            scheduler.accept(planned(MEMORY))
        assert scheduler.store.counters()["refused_memory"] == 2

    with_scheduler(tmp_path, body, works)


def test_a_new_scheduler_takes_everything_up_again(tmp_path):
    async def first(scheduler, pretended):
        ready = scheduler.accept(an_order(1), "one")[0].id
        await ended(scheduler, ready)
        jobs = [scheduler.accept(an_order(color))[0].id for color in (2, 3)]
        await comes(lambda: all(scheduler.store.job(job).status == "running" for job in jobs))
        return ready, jobs

    async def second(scheduler, pretended):
        done = await ended(scheduler, *jobs)
        assert [job.status for job in done] == ["completed"] * 2
        assert [job.attempts for job in done] == [2, 2]
        colors = [scheduler.store.file(job, "out/p.txt").read_bytes() for job in (ready, *jobs)]
        assert colors == [b"1", b"2", b"3"]
        assert scheduler.accept(an_order(1), "one")[0].id == ready
        assert [color for _, color in pretended.begun] == [2, 3]
        assert scheduler.store.counters()["taken_up_again"] == 2

    ready, jobs = with_scheduler(tmp_path, first, works, hangs)
    with_scheduler(tmp_path, second, works)


def test_many_jobs_on_workers_that_keep_dying_end_exactly_once(tmp_path):
    import random

    dice = random.Random(5)

    async def fickle(job, wanted):
        await asyncio.sleep(dice.random() / 500)
        async for event in (works, works, dies, is_lost_before)[dice.randrange(4)](job, wanted):
            yield event

    async def body(scheduler, pretended):
        jobs = [scheduler.accept(an_order(color), f"k{color}")[0].id for color in range(24)]
        done = await ended(scheduler, *jobs)
        assert {job.status for job in done} == {"completed"}
        for color, job in enumerate(jobs):
            assert scheduler.store.file(job, "out/p.txt").read_bytes() == str(color).encode()
            assert pretended.ended.count(job) <= 1
        counted = scheduler.store.counters()
        assert counted["completed"] == 24 and counted["workers_lost"] > 0

    with_scheduler(tmp_path, body, fickle, attempts=40)
