"""The scheduler: takes orders in, hands them to workers, tries again when a worker is lost.

`Run` is whatever runs one order and tells what happens as events; under Ray Serve that is a call to
a worker replica, in a test a few lines. An exception from it means that the worker is lost, since a
graph that fails is an event and not an exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.report import megabytes
from .job_request import FILE_NAME, JobRequest
from .store import CANCELLED, ENDED, FAILED, RUNNING, FullError, Job, Store

# Events: started {worker, memory}; file {name, data}, in pieces, each name's one after the other;
# done {shown}; failed {error}.
Event = Mapping[str, Any]
Run = Callable[[str, JobRequest], AsyncIterator[Event]]
PAUSE, LONGEST_PAUSE = 0.5, 15.0
# Beyond its own time limit a worker needs some to stop a graph and answer.
GRACE = 120.0
SWEEP = 60.0
RECENT = 20
LONGEST_NAME = 200
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


class TooLargeError(FrugalError):
    """The plan says that no worker has the memory for it."""


class NotYetError(FrugalError):
    """It cannot be said yet; ask again later."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """queue: jobs that may be open at once. attempts: how often a job is begun. job_seconds: time
    of one attempt. wait_seconds: time until it is begun. keep_seconds: how long what ended is kept;
    0: until deleted. memory: bytes of a worker; 0: as the workers report.
    """

    queue: int = 64
    attempts: int = 4
    job_seconds: float = 3600.0
    wait_seconds: float = 6 * 3600.0
    keep_seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Rules(Limits):
    """at_once: orders given out at one time; those beyond the number of workers wait where they
    show that more are wanted.
    """

    at_once: int = 64


class JobScheduler:
    """Made inside an event loop, which it stays in."""

    def __init__(self, store: Store, run: Run, rules: Rules):
        self.store, self.run, self.rules = store, run, rules
        self.workers: dict[str, int] = {}
        self.memory = rules.memory
        self._turn = asyncio.Semaphore(rules.at_once)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._sweeper: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Take up every job that was accepted before."""
        again = self.store.recover()
        if again:
            self.store.count("taken_up_again", again)
        for job in self.store.waiting():
            self._begin(job)
        self._sweeper = asyncio.ensure_future(self._sweep())

    async def close(self) -> None:
        """Stop; open jobs stay open in the store."""
        tasks = [*self._tasks.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.store.close()

    # What a client asks for

    def accept(self, order: JobRequest, key: str = "") -> tuple[Job, bool]:
        """The job and whether it is new. Raises TooLargeError, NotYetError, FullError,
        KeyReusedError.
        """
        try:
            self._admit(order)
            job, new = self.store.add(order, key, self.rules.queue)
        except FullError:
            self.store.count("refused_full")
            raise
        except TooLargeError:
            self.store.count("refused_memory")
            raise
        if new:
            self.store.count("accepted")
            self._begin(job.id)
        return job, new

    def _admit(self, order: JobRequest) -> None:
        if not order.needs:
            return
        if not self.memory:
            raise NotYetError(
                "no worker has said yet how much memory it has",
                "a worker that is up, to hold the plan against",
                "send the job again in a minute",
            )
        if order.needs > self.memory:
            raise TooLargeError(
                f"the plan needs {megabytes(order.needs)} and a worker has "
                f"{megabytes(self.memory)}",
                "a plan that fits",
                "plan it with that as budget_gb, or use a larger card",
            )

    async def cancel(self, job: str) -> bool:
        """False if it had ended. Raises KeyError for an unknown one."""
        if self.store.job(job).status in ENDED:
            return False
        cancelled = self.store.fail(job, "cancelled by request", CANCELLED)
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()
        if cancelled:
            self.store.count(CANCELLED)
        return cancelled

    def retry_after(self) -> int:
        """Whole seconds after which a place may be free: a job's usual time over those that run."""
        usual = sum(self._seconds) / len(self._seconds) if self._seconds else 10.0
        running = self.store.counts()[RUNNING]
        return max(1, min(300, math.ceil(usual / max(1, running))))

    # Running

    def _begin(self, job: str) -> None:
        task = asyncio.ensure_future(self._through(job))
        self._tasks[job] = task

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(job, None)

        task.add_done_callback(ended)

    async def _through(self, job: str) -> None:
        """One job to its end, whatever happens."""
        # An order is read when its turn comes: the pictures of all that wait would fill the memory.
        async with self._turn:
            pause = PAUSE
            while True:
                try:
                    await self._tries(job)
                    return
                except (OSError, sqlite3.Error) as error:
                    # The disk is full or gone: no worker's fault, and no end for the job.
                    LOG.error("[Frugal] the fleet's store cannot be written: %s", _short(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _tries(self, job: str) -> None:
        began, pause = time.monotonic(), PAUSE
        while True:
            now = self.store.job(job)
            if now.status in ENDED:
                return
            before = now.attempts
            try:
                await self._attempt(job)
                return
            except Exception as error:
                if isinstance(error, sqlite3.Error) or getattr(error, "errno", None) in DISK:
                    raise
                lost = f"{type(error).__name__}: {_short(error)}"
            row = self.store.job(job)
            if row.status in ENDED:
                return
            begun = row.attempts > before
            if begun:
                self.store.count("workers_lost")
                self.store.requeue(job, f"attempt {row.attempts} on {row.worker}: {lost}")
                began, pause = time.monotonic(), PAUSE
            if begun and row.attempts >= self.rules.attempts:
                self._fail(
                    job,
                    f"the worker was lost in each of {row.attempts} attempts, at last with {lost}; "
                    "look into the worker's log, and at the memory that this graph needs.",
                )
                return
            if time.monotonic() - began > self.rules.wait_seconds:
                self._fail(
                    job,
                    f"no worker began with it within {self.rules.wait_seconds:g} s, at last "
                    f"{lost}; look whether workers are up.",
                )
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _attempt(self, job: str) -> None:
        """Raises when the worker is lost, however that shows."""
        folder = self.store.attempt_folder(job)
        began = time.monotonic()
        limit = self.rules.wait_seconds
        events = self.run(job, self.store.order(job))
        try:
            while True:
                left = limit - (time.monotonic() - began)
                # wait_for is enough: nothing else awaits these events.
                event = await asyncio.wait_for(events.__anext__(), max(left, 0.01))
                kind = event["kind"]
                if kind == "started":
                    began, limit = time.monotonic(), self.rules.job_seconds + GRACE
                    self.seen(event["worker"], event["memory"])
                    self.store.start(job, event["worker"])
                elif kind == "file":
                    with _inside(folder, event["name"]).open("ab") as file:
                        file.write(event["data"])
                elif kind == "done":
                    self._seconds.append(time.monotonic() - began)
                    _keep(folder)
                    if self.store.complete(job, folder, event["shown"]):
                        self.store.count("completed")
                    return
                elif kind == "failed":
                    self._seconds.append(time.monotonic() - began)
                    self._fail(job, event["error"])
                    return
        except StopAsyncIteration:
            raise RuntimeError("the worker ended without a result") from None
        finally:
            with contextlib.suppress(Exception):
                await events.aclose()  # type: ignore[attr-defined]

    def _fail(self, job: str, error: str) -> None:
        if self.store.fail(job, error):
            self.store.count(FAILED)

    def seen(self, worker: str, memory: int) -> None:
        """A worker is up and has so many bytes."""
        self.workers[worker] = memory
        while len(self.workers) > RECENT:
            del self.workers[next(iter(self.workers))]
        if not self.rules.memory and memory:
            # The router may choose any of them.
            self.memory = min(each for each in self.workers.values() if each)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                self.store.flush()
                if self.rules.keep_seconds:
                    self.store.count("expired", self.store.expire(self.rules.keep_seconds))
            except (OSError, sqlite3.Error) as error:
                LOG.error("[Frugal] the fleet's store cannot be written: %s", _short(error))


def _inside(folder: Path, name: str) -> Path:
    """Where a result of that name goes; its folders are made. What a name of Windows or of a disk
    cannot be is replaced, so that `%date:hh-mm%` in a prefix costs no picture.
    """
    parts = name.split("/")
    if {"", ".", ".."} & set(parts):
        raise RuntimeError(f"a worker sent a file called {ascii(name)[:80]}")
    path = folder.joinpath(*map(_storable, parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _storable(part: str) -> str:
    if FILE_NAME.fullmatch(part):
        return part
    plain = "".join("_" if c in '\\:*?"<>|' or not c.isprintable() else c for c in part)
    if plain == part and len(part.encode()) <= LONGEST_NAME:
        return part
    # Two names must not become one.
    mark = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    stem, dot, suffix = plain.rpartition(".")
    stem, suffix = (stem, suffix) if dot and len(suffix) < 12 else (plain, "")
    short = stem.encode()[: LONGEST_NAME - 32].decode("utf-8", "ignore")
    return f"{short}-{mark}{dot if suffix else ''}{suffix}"


def _keep(folder: Path) -> None:
    for each in folder.rglob("*"):
        if each.is_file():
            with each.open("rb+") as file:
                os.fsync(file.fileno())


def _short(error: BaseException) -> str:
    # Ray's message holds traces of two processes and advice; what a worker raised stands last.
    if type(error).__name__ in ("ActorDiedError", "ActorUnavailableError"):
        return "the worker's process and its ComfyUI have ended"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ascii(lines[-1] if lines else "")[1:-1][:300]
