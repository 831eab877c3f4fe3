"""Wait for a coroutine in a way that a cancel button can end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

# `async with within(seconds)` raises asyncio.TimeoutError. asyncio.wait_for would do the same, but
# up to Python 3.11 loses a cancel that comes as its work ends.
_MAKER = asyncio if hasattr(asyncio, "timeout") else importlib.import_module("async_timeout")
within: Callable[[float], Any] = getattr(_MAKER, "timeout")  # noqa: B009

T = TypeVar("T")


def run(
    work: Coroutine[Any, Any, T], check: Callable[[], None] = lambda: None, interval: float = 0.1
) -> T:
    """The result of `work`, which runs in an event loop of its own. `check` is called every
    `interval` seconds in the caller's thread; what it raises cancels the work, lets it clean up,
    and is raised again.
    """
    outcome: Future[T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def main() -> T:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    def body() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:
            outcome.set_exception(error)
            if not started.done():
                work.close()
                started.set_exception(error)

    thread = threading.Thread(target=body, name="frugal-remote", daemon=True)
    thread.start()
    loop, task = started.result()
    try:
        while not outcome.done():
            wait([outcome], timeout=interval)
            check()
    except BaseException:
        # The loop may have ended by itself in between.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    thread.join()
    return outcome.result()
