"""Compiling the mask kernels before their first use, in the background.

Numba compiles a kernel at its first call, which after an install takes many seconds for all of
them. `start` runs every operation once on a few pixels, in a thread of its own, while a graph still
loads its models. Numba compiles one function at a time in the whole process: a node that comes
in the meantime waits for what it needs, and compiles nothing twice.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable

import numpy as np

from . import agnostic, dispatch, pictures, refine

Rehearsal = Callable[[], object]


def rehearsals() -> list[Rehearsal]:
    """Calls that together run every mask kernel, each in the dtypes that masks of usual settings
    take; the flagship's defaults and neighbours come first.
    """
    mask = np.zeros((1, 72, 80), np.float32)
    mask[:, 10:60, 10:60], mask[:, 30:40, 30:40] = 1, 0
    soft, clip = mask * np.float32(0.75), np.repeat(mask, 2, axis=0)
    picture = np.zeros((1, 72, 80, 3), np.float32)
    labels = np.zeros((1, 72, 80), np.uint8)
    chains: list[dict] = [
        dict(fill_holes=-1, drop_islands=4),
        dict(grow=3),
        dict(feather=3.0),
        dict(feather=3.0, feather_mode="gaussian"),
        dict(grow=-3, feather=20.0, feather_mode="ramp_center"),
        dict(threshold=0.0, grow=2),
        dict(threshold=0.0, grow=2, grow_shape="square"),
        dict(threshold=0.0, fill_holes=-1, drop_islands=4, feather=3.0, feather_mode="gaussian"),
        dict(feather=20.0, feather_mode="gaussian"),
    ]
    chosen = [refine.RefineSettings(**changes) for changes in chains]
    over_time = [
        refine.RefineSettings(threshold=0.0, temporal=mode)
        for mode in ("median3", "ema_both", "union")
    ]
    hulls = ("per_region", "whole")
    none = np.zeros(1, np.int64)
    return [
        *(functools.partial(refine.refine, soft, settings) for settings in chosen),
        functools.partial(refine.bbox, mask),
        functools.partial(pictures.composite, picture, picture, soft, none, none),
        functools.partial(refine.regions, mask),
        *(functools.partial(refine.refine, clip, settings) for settings in over_time),
        *(functools.partial(refine.hull, mask, mode) for mode in hulls),
        functools.partial(
            agnostic.agnostic_mask, labels, labels, labels, agnostic.AgnosticSettings()
        ),
    ]


def run(calls: list[Rehearsal], stop: threading.Event) -> int:
    """Make the calls one after another until `stop` is set; returns how many were made."""
    done = 0
    for call in calls:
        if stop.is_set():
            break
        call()
        done += 1
    return done


@functools.cache
def start() -> threading.Thread:
    """Begin the warm-up in the background; only the first call in a process does.

    The thread ends by itself, and at the end of the process after the call it is in. Without Numba
    there is nothing to compile, and it ends at once.
    """
    stop = threading.Event()

    def work() -> None:
        if dispatch.numba_chain() is not None:
            run(rehearsals(), stop)

    thread = threading.Thread(target=work, name="frugal-masks-warm-up", daemon=True)

    # A daemon thread inside LLVM while the interpreter goes down can bring the process down with
    # it; a plain one would make the user wait for all the rest.
    def end() -> None:
        stop.set()
        thread.join()

    atexit.register(end)
    thread.start()
    return thread
