"""The pack's own threads for masks: frames or bands side by side, cancelled by the caller.

Numba's parallel layer is not used: two callers at once abort the process under its workqueue. The
the kernels hold no GIL, so plain Python threads run them side by side.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

Progress = Callable[[int, int], None]
MAX_THREADS = 8


def thread_count() -> int:
    """Threads by default: the cores this process may use, at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, MAX_THREADS)


def ranges(size: int, parts: int) -> list[tuple[int, int]]:
    """At most `parts` contiguous ranges that cover 0..size."""
    step = max(1, -(-size // max(1, parts)))
    return [(a, min(a + step, size)) for a in range(0, size, step)]


def spread(tasks: Sequence[Callable[[], int]], threads: int, done: Callable[[int], None]) -> None:
    """Run the tasks; `done` gets each result in the calling thread, and what it raises stops the
    rest.
    """
    if threads == 1 or len(tasks) == 1:
        for task in tasks:
            done(task())
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="frugal-masks")
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            done(future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def counter(count: int, progress: Progress | None) -> Callable[[int], None]:
    """Adds up finished frames and tells `progress(done, count)`."""
    finished = 0

    def advance(frames_done: int) -> None:
        nonlocal finished
        finished += frames_done
        if progress:
            progress(finished, count)

    return advance


def over_frames(
    count: int, work: Callable[[int], None], progress: Progress | None, threads: int | None
) -> None:
    """Call work(n) for every frame n, in shares over the threads (None: `thread_count`).

    progress(done, count) runs in the calling thread after each share and may raise to cancel.
    """
    threads = threads or thread_count()

    def share(a: int, b: int) -> int:
        for n in range(a, b):
            work(n)
        return b - a

    spans = ranges(count, min(count, 4 * threads))
    tasks = [functools.partial(share, a, b) for a, b in spans]
    spread(tasks, threads, counter(count, progress))
