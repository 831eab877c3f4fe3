"""Fleets for the tests: pretended workers for errors, and the real HTTP side in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from frugal.servers.fleet.http import application, hashed
from frugal.servers.fleet.job_request import JobRequest, order
from frugal.servers.fleet.scheduler import Event, JobScheduler, Rules
from frugal.servers.fleet.store import Store
from frugal.tests.helpers.patience import FOREVER, HANG, comes

TOKEN = "a-token-for-the-tests"
MEMORY = 8 * 10**9


def picture_graph(color: int = 0, size: int = 16) -> dict:
    """A graph that saves one plain picture."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": size, "batch_size": 1, "color": color},
            "_meta": {"title": "Paint"},
        },
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "out/p"},
        },
    }


def an_order(color: int = 0, **files: bytes) -> JobRequest:
    return order(json.dumps(picture_graph(color)), files)


@dataclass
class Pretended:
    """Workers whose doings a test gives: `acts` holds one per attempt, the last one for all later.
    `begun` holds (job, color) of each attempt, `ended` the jobs whose events were read to the end.
    """

    acts: list[Callable[[str, JobRequest], AsyncIterator[Event]]]
    begun: list[tuple[str, int]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    async def run(self, job: str, wanted: JobRequest) -> AsyncIterator[Event]:
        act = self.acts[min(len(self.begun), len(self.acts) - 1)]
        self.begun.append((job, wanted.workflow["1"]["inputs"]["color"]))
        async for event in act(job, wanted):
            yield event
        self.ended.append(job)


def started(worker: str = "w1", memory: int = MEMORY) -> Event:
    return {"kind": "started", "worker": worker, "memory": memory}


async def works(job: str, wanted: JobRequest) -> AsyncIterator[Event]:
    """A result that says what was asked for."""
    yield started()
    color = str(wanted.workflow["1"]["inputs"]["color"]).encode()
    yield {"kind": "file", "name": "out/p.txt", "data": color[:1]}
    yield {"kind": "file", "name": "out/p.txt", "data": color[1:]}
    yield {"kind": "file", "name": "empty.txt", "data": b""}
    yield {"kind": "done", "shown": {"2": {"text": ["x"]}}}


async def dies(job: str, wanted: JobRequest) -> AsyncIterator[Event]:
    """Lost in the middle of a result."""
    yield started()
    yield {"kind": "file", "name": "out/p.txt", "data": b"half"}
    raise RuntimeError("the card fell off the bus")


async def is_lost_before(job: str, wanted: JobRequest) -> AsyncIterator[Event]:
    """Gone before it began."""
    raise ConnectionError("nobody there")
    yield started()


async def complains(job: str, wanted: JobRequest) -> AsyncIterator[Event]:
    """A graph that fails."""
    yield started()
    yield {"kind": "failed", "error": "node 1 (EmptyImage): no"}


async def hangs(job: str, wanted: JobRequest) -> AsyncIterator[Event]:
    """Never ends."""
    yield started()
    await asyncio.sleep(FOREVER)
    yield {"kind": "done", "shown": {}}


@dataclass
class Running:
    """A scheduler that answers at `url`; `scheduler` belongs to the thread's loop."""

    url: str
    scheduler: JobScheduler
    loop: asyncio.AbstractEventLoop
    pretended: Pretended


@contextlib.contextmanager
def running(
    store: Path,
    *acts: Callable[[str, JobRequest], AsyncIterator[Event]],
    largest: int = 10**6,
    **rules,
) -> Iterator[Running]:
    """The real HTTP side on loopback before pretended workers."""
    pretended, ready, loop = Pretended([*acts]), threading.Event(), asyncio.new_event_loop()
    held: list[JobScheduler] = []
    app = application(lambda: held[0], hashed(TOKEN), largest)
    web = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    web.install_signal_handlers = lambda: None

    async def serve() -> None:
        scheduler = JobScheduler(Store(store), pretended.run, Rules(**rules))
        held.append(scheduler)
        scheduler.open()
        task = asyncio.ensure_future(web.serve())
        await comes(lambda: web.started or task.done())
        ready.set()
        await task
        await scheduler.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(HANG) and web.started
    port = web.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", held[0], loop, pretended)
    finally:
        web.should_exit = True
        thread.join(HANG)
        loop.close()
