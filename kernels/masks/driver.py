"""Chooses Numba or the reference, and spreads frames or bands over the pack's own threads.

The result does not depend on the number of threads: a frame is computed alone, and bands overlap
by the full reach.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import ModuleType

import numpy as np

from . import reference
from .settings import RefineSettings

Progress = Callable[[int, int], None]
MAX_THREADS = 8
SPLIT_FROM = 2_000_000


@functools.cache
def numba_chain() -> ModuleType | None:
    """The Numba chain, or None (told once in the log) where Numba cannot be used."""
    try:
        from . import numba_chain as chain
    except (ImportError, SystemError) as error:  # SystemError: an old Numba on a newer NumPy
        logging.warning(
            "[Frugal] mask nodes run on SciPy, several times slower: Numba is off (%s).", error
        )
        return None
    return chain


def backend() -> str:
    """ "numba" or "scipy": what `run_chain` takes here."""
    return "numba" if numba_chain() else "scipy"


def thread_count() -> int:
    """Threads by default: the cores this process may use, at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, MAX_THREADS)


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


def run_chain(
    frames: np.ndarray,
    settings: RefineSettings,
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """The whole chain over float32 C-contiguous [B, H, W], none of them empty; a new float32 array
    of that shape.

    progress(done, total) is called in the calling thread after each share of the frames; it may
    raise to cancel.
    use_numba: None takes Numba if it is there.
    """
    chain = numba_chain() if use_numba is not False else None
    threads = threads or thread_count()
    out = np.empty(frames.shape, np.float32)
    count = len(frames)
    finished = 0

    def advance(frames_done: int) -> None:
        nonlocal finished
        finished += frames_done
        if progress:
            progress(finished, count)

    if chain is None:
        frames = np.nan_to_num(frames, nan=0.0, posinf=np.inf, neginf=-np.inf)
        if settings.temporal != "off":
            frames = reference.smooth(frames, settings.temporal, settings.temporal_strength)
        for n in range(count):
            reference.refine_frame(frames[n], settings, out[n])
            advance(1)
        return out
    if settings.temporal != "off":
        flat, smoothed = frames.reshape(count, -1), out.reshape(count, -1)
        how = settings.temporal, settings.temporal_strength
        tasks = [
            functools.partial(chain.smooth, flat, *how, smoothed, a, b)
            for a, b in chain.ranges(flat.shape[1], threads)
        ]
        spread(tasks, threads, lambda _: advance(0))
        frames = out
    plan = chain.Plan.of(settings)
    local = threading.local()

    def scratch():
        if not hasattr(local, "scratch"):
            local.scratch = chain.Scratch()
        return local.scratch

    if count < threads and frames[0].size >= SPLIT_FROM:

        def run(tasks: Sequence[Callable]) -> None:
            spread([lambda task=task: task(scratch()) for task in tasks], threads, lambda _: None)

        for n in range(count):
            chain.refine_frame(frames[n], plan, out[n], scratch(), threads, run)
            advance(1)
        return out

    def run_here(tasks: Sequence[Callable]) -> None:
        for task in tasks:
            task(scratch())

    def share(a: int, b: int) -> int:
        for n in range(a, b):
            chain.refine_frame(frames[n], plan, out[n], scratch(), 1, run_here)
        return b - a

    spans = chain.ranges(count, min(count, 4 * threads))
    spread([functools.partial(share, a, b) for a, b in spans], threads, advance)
    return out


def bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows with a value above 0 in any frame of [B, H, W]: bool [W], bool [H]."""
    chain = numba_chain()
    if chain is None:
        return reference.bounds(mask)
    columns = np.zeros(mask.shape[2], np.uint8)
    rows = np.zeros(mask.shape[1], bool)
    for frame in mask:
        top, bottom = chain.bounds(frame, columns)
        if top < bottom:
            rows[[top, bottom - 1]] = True
    return columns.astype(bool), rows
