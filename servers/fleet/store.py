"""Jobs on disk: accepted means written, and a finished result stays until it is deleted.

`index.sqlite` says what is true of a job; a folder per job holds its bytes. A result is written to
a folder beside and renamed before the index calls it finished, so a reader never sees half of it.
One process at a time has the store (a lock file says so): whoever opens it may therefore take
every job that is marked as running for one whose runner is gone.

Only what the store made itself is ever deleted: a folder that it did not begin is refused, links
are left alone, and results that the index does not know (it was lost, or is older) are taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from .job_request import JobRequest

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = (
    "queued", "running", "completed", "failed", "cancelled",
)  # fmt: skip
OPEN, ENDED = (QUEUED, RUNNING), (COMPLETED, FAILED, CANCELLED)
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, key TEXT UNIQUE, digest TEXT NOT NULL, status TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, needs INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL,
    started REAL, ended REAL, clock REAL, worker TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '', shown TEXT NOT NULL DEFAULT '{}',
    files TEXT NOT NULL DEFAULT '[]', notes TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, created);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clock (seconds REAL NOT NULL);
"""
# Columns that an index of an earlier version lacks, with their types.
LATER = {"clock": "REAL"}
FIELDS = (
    "id", "key", "status", "attempts", "needs", "created", "started", "ended", "worker", "error",
    "shown", "files", "notes",
)  # fmt: skip
PLACE, OUTPUT, WORKFLOW = "input", "output", "workflow.json"
MARKER = "frugal-fleet-store"
LOCK, INDEX = "in-use.lock", "index.sqlite"
# What may lie in a new store before its first job: what `launch.py` writes there.
EARLIER = {LOCK, "token", "ray-token", "work"}
DELETED = "deleted-"
JOB = re.compile(rf"({DELETED})?([0-9a-f]{{32}})")


class FullError(FrugalError):
    """As many jobs are open as may be."""


class KeyReusedError(FrugalError):
    """The Idempotency-Key belongs to another order."""


@dataclass(frozen=True)
class Job:
    """One row. Times are seconds since 1970. shown: node id -> what ComfyUI showed. files: {name,
    bytes} of the results, in order. notes: what happened on the way.
    """

    id: str
    key: str
    status: str
    attempts: int
    needs: int
    created: float
    started: float | None
    ended: float | None
    worker: str
    error: str
    shown: dict[str, Any]
    files: list[dict[str, Any]]
    notes: list[str]


def claim(folder: Path) -> None:
    """Mark the folder as a store. Raises FrugalError for one with files of somebody else."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    there = {each.name for each in folder.iterdir()}
    if not there & {MARKER, INDEX} and (strange := sorted(there - EARLIER)):
        raise FrugalError(
            f"the folder {folder} holds {strange[0]!a} and is no store",
            "an empty folder, or a store",
            "name an empty folder for the store",
        )
    (folder / MARKER).touch()


class Store:
    """The jobs under `folder`. Not for two threads at once. Raises FrugalError where another
    process has it after `patience` seconds.
    """

    def __init__(self, folder: Path, patience: float = 30.0):
        from filelock import FileLock, Timeout

        self.folder, self.jobs = folder, folder / "jobs"
        claim(folder)
        self.jobs.mkdir(exist_ok=True, mode=0o700)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise FrugalError(
                f"another fleet uses the store {folder}",
                "one fleet per store",
                "stop the other one, or name another folder",
            ) from None
        # Serve may build the object in one thread and use it in another, one after the other.
        self._base = sqlite3.connect(folder / INDEX, isolation_level=None, check_same_thread=False)
        self._noted: Counter[str] = Counter()
        try:
            self._begin()
        except BaseException as error:
            self._base.close()
            self._lock.release()
            if not isinstance(error, sqlite3.DatabaseError):
                raise
            raise _refusal(folder, error) from error
        self._opened = time.monotonic()
        self._sweep()

    def _begin(self) -> None:
        # Held in the index itself too: a lock file can be deleted while it is in use.
        self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=FULL")
        self._base.executescript(TABLE)
        there = {row[1] for row in self._base.execute("PRAGMA table_info(jobs)")}
        for name in LATER.keys() - there:
            self._base.execute(f"ALTER TABLE jobs ADD COLUMN {name} {LATER[name]}")
        found = self._base.execute("SELECT seconds FROM clock").fetchone()
        if found is None:
            self._base.execute("INSERT INTO clock VALUES (0)")
        self._before = found[0] if found else 0.0
        self._base.execute(
            "UPDATE jobs SET clock = ? WHERE ended IS NOT NULL AND clock IS NULL", (self._before,)
        )

    def close(self) -> None:
        """Give the store free."""
        try:
            with contextlib.suppress(sqlite3.Error):
                self.flush()
        finally:
            self._base.close()
            self._lock.release()

    def clock(self) -> float:
        """Seconds that a fleet has had this store open, over all its runs.

        Ages are counted by it: by the time of day a clock that jumped a year ahead would expire
        every result.
        """
        return self._before + time.monotonic() - self._opened

    def note(self, name: str) -> None:
        """Add one to a counter without touching the disk, until `flush`."""
        self._noted[name] += 1

    def flush(self) -> None:
        """Write what is only in memory: the noted counters and the clock."""
        for name, more in self._noted.items():
            self.count(name, more)
        self._noted.clear()
        self._base.execute("UPDATE clock SET seconds = ?", (self.clock(),))

    def _sweep(self) -> None:
        """Delete orders that were never accepted; take back results that are not listed."""
        known = {row[0] for row in self._base.execute("SELECT id FROM jobs")}
        for folder in list(self.jobs.iterdir()):
            ours = JOB.fullmatch(folder.name)
            if folder.name in known or folder.is_symlink() or not ours:
                continue
            if ours[1]:
                self._base.execute("DELETE FROM jobs WHERE id = ?", (ours[2],))
                shutil.rmtree(folder, ignore_errors=True)
            elif (folder / OUTPUT).is_dir():
                self._take_back(folder)
            elif not any(folder.glob("attempt-*")):
                shutil.rmtree(folder, ignore_errors=True)

    def _take_back(self, folder: Path) -> None:
        made = (folder / OUTPUT).stat().st_mtime
        self._base.execute(
            "INSERT INTO jobs (id, digest, status, created, ended, clock, files, notes)"
            " VALUES (?, '', ?, ?, ?, ?, ?, ?)",
            (
                folder.name, COMPLETED, made, time.time(), self.clock(),
                json.dumps(_files(folder / OUTPUT)),
                json.dumps(["its result was found on disk; the index did not know it"]),
            ),
        )  # fmt: skip

    # Orders come in

    def add(self, order: JobRequest, key: str, most: int) -> tuple[Job, bool]:
        """The job for `order`, and whether it is new: a key that was used gives its job again.

        Raises FullError where `most` jobs are open, KeyReusedError where the key belongs to
        another order. When it returns, the job is on disk.
        """
        digest = order.digest()
        if key and (found := self._one("key = ?", key)):
            if self._digest(found.id) != digest:
                raise KeyReusedError(
                    f"the Idempotency-Key of job {found.id}, which is another order",
                    "a key of its own for each order",
                    "send a new key",
                )
            return found, False
        if self.open_jobs() >= most:
            raise FullError(
                f"{most} jobs wait or run", "room for one more", "send the job again later"
            )
        job = uuid.uuid4().hex
        place = self.jobs / job / PLACE
        place.mkdir(parents=True)
        for name, data in order.files.items():
            _write(place / name, data)
        _write(self.jobs / job / WORKFLOW, json.dumps(order.workflow).encode())
        self._base.execute(
            "INSERT INTO jobs (id, key, digest, status, needs, created) VALUES (?, ?, ?, ?, ?, ?)",
            (job, key or None, digest, QUEUED, order.needs, time.time()),
        )
        return self.job(job), True

    def order(self, job: str) -> JobRequest:
        """What `job` is to run."""
        place = self.jobs / job
        files = {each.name: each.read_bytes() for each in sorted((place / PLACE).iterdir())}
        return JobRequest(json.loads((place / WORKFLOW).read_bytes()), files)

    # What is known

    def job(self, job: str) -> Job:
        """Raises KeyError for an unknown one."""
        found = self._one("id = ?", job)
        if found is None:
            raise KeyError(job)
        return found

    def list(self, status: str = "", limit: int = 100) -> list[Job]:
        """The newest first."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())
        rows = self._base.execute(
            f"SELECT {', '.join(FIELDS)} FROM jobs {where} ORDER BY created DESC, rowid DESC"
            " LIMIT ?",
            (*values, limit),
        )
        return [_job(row) for row in rows]

    def waiting(self) -> list[str]:
        """Ids of the queued jobs, the oldest first."""
        rows = self._base.execute(
            "SELECT id FROM jobs WHERE status = ? ORDER BY created, rowid", (QUEUED,)
        )
        return [row[0] for row in rows]

    def open_jobs(self) -> int:
        """How many are queued or running."""
        return sum(count for status, count in self.counts().items() if status in OPEN)

    def counts(self) -> dict[str, int]:
        """status -> number of jobs that are kept."""
        rows = self._base.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status")
        return {**dict.fromkeys((*OPEN, *ENDED), 0), **dict(rows.fetchall())}

    def bytes_kept(self) -> int:
        """Bytes of all results, as the index has them."""
        rows = self._base.execute("SELECT files FROM jobs WHERE files != '[]'")
        return sum(each["bytes"] for row in rows for each in json.loads(row[0]))

    def count(self, name: str, more: int = 1) -> int:
        """Add to a counter that outlives the process; returns its value."""
        self._base.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?",
            (name, more, more),
        )
        row = self._base.execute("SELECT value FROM counts WHERE name = ?", (name,)).fetchone()
        return row[0]

    def counters(self) -> dict[str, int]:
        """All counters."""
        kept = self._base.execute("SELECT name, value FROM counts ORDER BY name").fetchall()
        return dict(Counter(dict(kept)) + self._noted)

    # What happens to a job

    def recover(self) -> int:
        """Queue again what was running when the last process ended; returns how many."""
        return self._base.execute(
            "UPDATE jobs SET status = ? WHERE status = ?", (QUEUED, RUNNING)
        ).rowcount

    def start(self, job: str, worker: str) -> int:
        """A worker has begun with it; returns the number of this attempt, from 1."""
        self._base.execute(
            "UPDATE jobs SET status = ?, attempts = attempts + 1, worker = ?, started = ?"
            " WHERE id = ? AND status IN (?, ?)",
            (RUNNING, worker, time.time(), job, *OPEN),
        )
        return self.job(job).attempts

    def requeue(self, job: str, note: str) -> None:
        """The worker is lost; the job waits again."""
        notes = [*self.job(job).notes, note]
        self._base.execute(
            "UPDATE jobs SET status = ?, notes = ? WHERE id = ? AND status IN (?, ?)",
            (QUEUED, json.dumps(notes), job, *OPEN),
        )

    def attempt_folder(self, job: str) -> Path:
        """A new folder for the files of one attempt."""
        folder = self.jobs / job / f"attempt-{uuid.uuid4().hex[:12]}"
        folder.mkdir()
        return folder

    def complete(self, job: str, folder: Path, shown: Mapping[str, Any]) -> bool:
        """The files of `folder` are the result. False if the job had ended before."""
        files = _files(folder)
        if self.job(job).status in ENDED:
            shutil.rmtree(folder, ignore_errors=True)
            return False
        output = self.jobs / job / OUTPUT
        # Of a process that ended between this rename and the next line.
        shutil.rmtree(output, ignore_errors=True)
        os.replace(folder, output)
        return self._end(job, COMPLETED, "", _plain(shown), json.dumps(files))

    def fail(self, job: str, error: str, status: str = FAILED) -> bool:
        """It ended without a result. False if it had ended before."""
        return self._end(job, status, error, "{}", "[]")

    def _end(self, job: str, status: str, error: str, shown: str, files: str) -> bool:
        changed = self._base.execute(
            "UPDATE jobs SET status = ?, error = ?, shown = ?, files = ?, ended = ?, clock = ?"
            " WHERE id = ? AND status IN (?, ?)",
            (status, error, shown, files, time.time(), self.clock(), job, *OPEN),
        ).rowcount
        if changed:
            shutil.rmtree(self.jobs / job / PLACE, ignore_errors=True)
            for left in (self.jobs / job).glob("attempt-*"):
                shutil.rmtree(left, ignore_errors=True)
        return bool(changed)

    def spoil(self, job: str, error: str, status: str) -> None:
        """A completed job whose result cannot be given any more; what is left of it stays."""
        self._base.execute(
            "UPDATE jobs SET status = ?, error = ?, files = '[]' WHERE id = ? AND status = ?",
            (status, error, job, COMPLETED),
        )

    def file(self, job: str, name: str) -> Path:
        """The path of a result. Raises KeyError where the job has no such file."""
        if name not in [each["name"] for each in self.job(job).files]:
            raise KeyError(name)
        return self.jobs / job / OUTPUT / name

    def delete(self, job: str) -> None:
        """Forget an ended job and its key. Raises KeyError for an unknown one, FrugalError for
        one that is open.
        """
        if self.job(job).status in OPEN:
            raise FrugalError(f"job {job} has not ended", "an ended job", "cancel the job first")
        # Under another name first: a process that ends here must not find the result again.
        gone = self.jobs / f"{DELETED}{job}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.jobs / job, gone)
        self._base.execute("DELETE FROM jobs WHERE id = ?", (job,))
        shutil.rmtree(gone, ignore_errors=True)

    def expire(self, seconds: float) -> int:
        """Delete what ended more than `seconds` of `clock` ago; returns how many."""
        rows = self._base.execute(
            "SELECT id FROM jobs WHERE ended IS NOT NULL AND clock < ?", (self.clock() - seconds,)
        ).fetchall()
        for row in rows:
            self.delete(row[0])
        return len(rows)

    def _one(self, where: str, value: str) -> Job | None:
        row = self._base.execute(
            f"SELECT {', '.join(FIELDS)} FROM jobs WHERE {where}", (value,)
        ).fetchone()
        return _job(row) if row else None

    def _digest(self, job: str) -> str:
        with contextlib.closing(
            self._base.execute("SELECT digest FROM jobs WHERE id = ?", (job,))
        ) as rows:
            return rows.fetchone()[0]


def _refusal(folder: Path, error: sqlite3.DatabaseError) -> FrugalError:
    if "locked" in str(error):
        return FrugalError(
            f"another fleet uses the store {folder}, whose lock file was deleted",
            "one fleet per store",
            "stop the other one, or name another folder",
        )
    return FrugalError(
        f"the index of the store {folder} is damaged ({error})",
        "a whole one",
        f"run python -m frugal.fleet check --repair --store {folder}",
    )


def _job(row: tuple[Any, ...]) -> Job:
    fields = dict(zip(FIELDS, row, strict=True))
    fields["key"] = fields["key"] or ""
    for name in ("shown", "files", "notes"):
        fields[name] = json.loads(fields[name])
    return Job(**fields)


def _plain(shown: Mapping[str, Any]) -> str:
    """As JSON that every reader takes: NaN and infinity, which JSON has not, as words."""
    return json.dumps(json.loads(json.dumps(shown), parse_constant=str))


def _files(folder: Path) -> list[dict[str, Any]]:
    return [
        {"name": each.relative_to(folder).as_posix(), "bytes": each.stat().st_size}
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    ]


def _write(path: Path, data: bytes) -> None:
    # What is accepted must survive a power cut too.
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
