"""Chooses Numba or the reference, and spreads frames or bands over the pack's own threads.

The result does not depend on the number of threads: a frame is computed alone, and bands overlap
by the full reach.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..log import LOG
from . import pages, pool, reference
from .pool import Progress
from .settings import RefineSettings
from .values import bounded

if TYPE_CHECKING:
    from .agnostic import AgnosticSettings

SPLIT_FROM = 2_000_000


@functools.cache
def numba_chain() -> ModuleType | None:
    """The Numba chain, or None (told once in the log) where Numba cannot be used."""
    try:
        from . import numba_chain as chain
    except (ImportError, SystemError) as error:  # SystemError: an old Numba on a newer NumPy
        LOG.warning(
            "[Frugal] mask nodes run on SciPy, several times slower: Numba is off (%s).", error
        )
        return None
    return chain


def backend() -> str:
    """ "numba" or "scipy": what `run_chain` takes here."""
    return "numba" if numba_chain() else "scipy"


def _backend(use_numba: bool | None = None):
    """(chain, scratch): the Numba chain, or None where the reference runs, and a function that
    gives the calling thread's own work arrays.
    """
    chain = numba_chain() if use_numba is not False else None
    local = threading.local()

    def scratch() -> Any:
        if not hasattr(local, "scratch"):
            local.scratch = chain.Scratch() if chain else None
        return local.scratch

    return chain, scratch


def run_chain(
    frames: np.ndarray,
    settings: RefineSettings,
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
    inverse: np.ndarray | None = None,
) -> np.ndarray:
    """The whole chain over float32 C-contiguous [B, H, W], none of them empty; a new float32 array
    of that shape.

    inverse: float32 array of that shape, which gets 1 minus the result, frame by frame while the
    frame is still in the cache.

    progress(done, total) is called in the calling thread after each share of the frames; it may
    raise to cancel.
    use_numba: None takes Numba if it is there.
    """
    chain, scratch = _backend(use_numba)
    threads = threads or pool.thread_count()
    out = pages.fresh(frames.shape)
    count = len(frames)
    advance = pool.counter(count, progress)

    def invert(n: int | slice) -> None:
        if inverse is not None:
            np.subtract(np.float32(1), out[n], out=inverse[n])

    if chain is None:
        frames = bounded(frames)
        if settings.temporal != "off":
            frames = reference.smooth(frames, settings.temporal, settings.temporal_strength)
        for n in range(count):
            reference.refine_frame(frames[n], settings, out[n])
            invert(n)
            advance(1)
        return out
    if settings.temporal != "off":
        frames = bounded(frames)
        flat, smoothed = frames.reshape(count, -1), out.reshape(count, -1)
        how = settings.temporal, settings.temporal_strength
        tasks = [
            functools.partial(chain.smooth, flat, *how, smoothed, a, b)
            for a, b in pool.ranges(flat.shape[1], threads)
        ]
        pool.spread(tasks, threads, lambda _: advance(0))
        if settings.only_smooths:
            invert(slice(None))
            advance(count)
            return out
        frames = out
    plan = chain.Plan.of(settings)
    if count < threads and frames[0].size >= SPLIT_FROM:

        def run(tasks: Sequence[Callable]) -> None:
            each = [lambda task=task: task(scratch()) for task in tasks]
            pool.spread(each, threads, lambda _: None)

        for n in range(count):
            chain.refine_frame(frames[n], plan, out[n], scratch(), threads, run)
            invert(n)
            advance(1)
        return out

    def run_here(tasks: Sequence[Callable]) -> None:
        for task in tasks:
            task(scratch())

    def work(n: int) -> None:
        chain.refine_frame(frames[n], plan, out[n], scratch(), 1, run_here)
        invert(n)

    pool.over_frames(count, work, progress, threads)
    return out


def run_hull(
    frames: np.ndarray,
    threshold: float,
    whole: bool,
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """Convex hulls over float32 C-contiguous [B, H, W]: new float32 array of 0 and 1; arguments as
    of `run_chain`.
    """
    chain, scratch = _backend(use_numba)
    out = pages.fresh(frames.shape)

    def work(n: int) -> None:
        if chain:
            chain.hull_frame(frames[n], threshold, whole, out[n], scratch())
        else:
            out[n] = reference.hull_frame(frames[n] > np.float32(threshold), whole)

    pool.over_frames(len(frames), work, progress, threads)
    return out


def run_composite(
    destination: np.ndarray,
    source: np.ndarray,
    mask: np.ndarray,
    xs: np.ndarray,
    ys: np.ndarray,
    count: int,
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """Blend float32 C-contiguous source [B, h, w, C] at (xs[n], ys[n]) into destination [B, H, W,
    C] through mask [B, h, w]: new float32 [count, H, W, C]. A first axis of 1 repeats.
    """
    chain, scratch = _backend(use_numba)
    height, width, channels = destination.shape[1:]
    out = pages.fresh((count, height, width, channels))

    def work(n: int) -> None:
        under, over, weight = (a[n % len(a)] for a in (destination, source, mask))
        x, y = int(xs[n % len(xs)]), int(ys[n % len(ys)])
        if chain:
            chain.blend_frame(under, over, weight, y, x, out[n], scratch())
        else:
            out[n] = reference.blend(under, over, weight, y, x)

    pool.over_frames(count, work, progress, threads)
    return out


def run_agnostic(
    maps: tuple[np.ndarray, np.ndarray, np.ndarray],
    tables: tuple[np.ndarray, np.ndarray, np.ndarray],
    settings: AgnosticSettings,
    shape: tuple[int, int, int],
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """Agnostic masks from uint8 C-contiguous label maps [B or 1, H, W]: new float32 array of
    `shape`.
    """
    chain, scratch = _backend(use_numba)
    if chain:
        from . import numba_agnostic
    out = pages.fresh(shape)

    def work(n: int) -> None:
        frame = tuple(labels[n % len(labels)] for labels in maps)
        if chain:
            numba_agnostic.agnostic_frame(frame, tables, settings, out[n], scratch())
        else:
            out[n] = reference.agnostic_frame(frame, tables, settings)

    pool.over_frames(len(out), work, progress, threads)
    return out


def run_count(
    frames: np.ndarray, threshold: float, threads: int | None = None, use_numba: bool | None = None
) -> np.ndarray:
    """Number of 8-connected regions above `threshold` in every frame of float32 C-contiguous [B, H,
    W]: int64 [B].
    """
    chain, _ = _backend(use_numba)
    count = chain.count_regions if chain else reference.count_regions
    out = np.zeros(len(frames), np.int64)

    def work(n: int) -> None:
        out[n] = count(frames[n], threshold)

    pool.over_frames(len(frames), work, None, threads)
    return out


def run_boxes(
    frames: np.ndarray,
    threshold: float,
    share: int,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """Box of every frame of float32 C-contiguous [B, H, W], int64 [B, 4]; see `refine.boxes`."""
    chain, _ = _backend(use_numba)
    box = chain.box if chain else reference.box
    out = np.zeros((len(frames), 4), np.int64)

    def work(n: int) -> None:
        out[n] = box(frames[n], threshold, share)

    pool.over_frames(len(frames), work, None, threads)
    return out
