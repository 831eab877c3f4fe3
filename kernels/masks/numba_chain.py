"""The chain on Numba kernels. Importing this module imports Numba; `dispatch` does it on first use.

One frame runs on one thread, or, split into word rows and row bands, on several: both ways give
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import bits, blend, boxblur, components, hull, morphology, ramp, temporal
from .pool import ranges
from .settings import RefineSettings, ramp_table
from .values import bounded

Run = Callable[[Sequence[Callable[["Scratch"], None]]], None]
BAND = 256
# Columns blurred at a time: the sums of all rows in reach then stay in a core's cache.
STRIP = 1024


class Scratch:
    """Work arrays of one thread by name; they grow when needed and go when the call ends."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, type], np.ndarray] = {}

    def flat(self, name: str, size: int, dtype: type) -> np.ndarray:
        """An uninitialised 1-D array of exactly `size` cells."""
        held = self._arrays.get((name, dtype))
        if held is None or held.size < size:
            held = self._arrays[name, dtype] = np.empty(size, dtype)
        return held[:size]

    def plane(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An uninitialised C-contiguous array."""
        return self.flat(name, math.prod(shape), dtype).reshape(shape)


@dataclass(frozen=True)
class Plan:
    """Settings with everything that does not depend on the picture."""

    settings: RefineSettings
    heights: np.ndarray
    stairs: np.ndarray
    reach: int
    tables: tuple[np.ndarray, np.ndarray]
    curve: np.ndarray

    @classmethod
    def of(cls, settings: RefineSettings) -> Plan:
        unused = np.empty(0, np.float32)
        tables, curve, reach = (unused, unused), unused, 0
        if settings.feather and settings.feather_mode == "gaussian":
            reach = sum(w // 2 for w in settings.widths)
            curve = boxblur.step_curve(settings.widths)
        elif settings.feather:
            tables = ramp_table(settings.feather, settings.feather_mode)
            reach = round((len(tables[0]) - 1) ** 0.5)
        heights = morphology.profile(settings.grow_shape, abs(settings.grow))
        stairs = morphology.stairs(heights) if settings.soft else np.empty((0, 2), np.int64)
        return cls(settings, heights, stairs, reach, tables, curve)


def refine_frame(
    frame: np.ndarray, plan: Plan, out: np.ndarray, scratch: Scratch, parts: int, run: Run
) -> None:
    """All steps after temporal smoothing for one frame: float32 [H, W] into float32 [H, W] `out`
    (may be `frame`).

    `run` executes a list of tasks, on as many threads as it likes; `parts` says into how many to
    split.
    """
    s = plan.settings
    # A hard mask needs no grey kernels: the bits give the same result, many times faster.
    if s.soft and not bits.is_hard(frame):
        _soft_frame(frame, plan, out, scratch)
        return
    height, width = frame.shape
    count = -(-height // 64)
    words = scratch.plane("words", (count, width), np.uint64)
    threshold = np.float32(0.5 if s.soft else s.threshold)

    def pack(k0: int, k1: int) -> Callable[[Scratch], None]:
        return lambda own: bits.pack(
            frame, threshold, words, own.flat("row", width, np.uint8), k0, k1
        )

    run([pack(*span) for span in ranges(count, parts)])
    if s.fill_holes or s.cleans_islands:
        components.clean(words, height, s.fill_holes, s.drop_islands, s.keep_largest)
    if s.grow:
        _grow(words, height, plan, scratch, parts, run)
    _feather(words, plan, out, scratch, parts, run)


def _grow(
    words: np.ndarray, height: int, plan: Plan, scratch: Scratch, parts: int, run: Run
) -> None:
    if plan.settings.grow < 0:
        bits.complement(words, height)
    dilate(words, height, plan.heights, scratch, parts, run)
    if plan.settings.grow < 0:
        bits.complement(words, height)


def dilate(
    words: np.ndarray, height: int, heights: np.ndarray, scratch: Scratch, parts: int, run: Run
) -> None:
    """Dilate uint64 [K, W] `words` in place by the element whose column profile is `heights`."""
    count, width = words.shape
    radius = len(heights) - 1
    pad = 2 + radius // 64
    source = scratch.plane("source", (count + 2 * pad, width), np.uint64)
    source[:pad] = 0
    source[-pad:] = 0
    source[pad:-pad] = words

    def part(k0: int, k1: int) -> Callable[[Scratch], None]:
        def task(own: Scratch) -> None:
            v = own.flat("v", width + 2 * radius, np.uint64)
            near = own.flat("near64", width, np.uint64)
            morphology.dilate_bits(source, heights, near, v, words, height, k0, k1)

        return task

    run([part(*span) for span in ranges(count, parts)])


def _feather(
    words: np.ndarray, plan: Plan, out: np.ndarray, scratch: Scratch, parts: int, run: Run
) -> None:
    """Write the bits, with their soft edge, into `out`; only the box of set pixels and its margin
    is computed.
    """
    height, width = out.shape
    if not plan.settings.feather:
        run([_band(words, plan, out, 0, 0, a, b) for a, b in ranges(height, parts)])
        return
    ends = scratch.plane("ends", (len(words), 2), np.int64)
    bits.extent(words, ends)
    filled = np.flatnonzero(ends[:, 1])
    if not filled.size:
        out[:] = 0
        return
    reach = plan.reach
    x0 = max(0, int(ends[filled, 0].min()) - reach)
    x1 = min(width, int(ends[filled, 1].max()) + reach)
    k0 = max(0, 64 * int(filled[0]) - reach) >> 6
    k1 = -(-min(height, 64 * (int(filled[-1]) + 1) + reach) // 64)
    box = np.ascontiguousarray(words[k0:k1, x0:x1])
    y0, y1 = 64 * k0, min(height, 64 * k1)
    out[:y0] = 0
    out[y1:] = 0
    out[y0:y1, :x0] = 0
    out[y0:y1, x1:] = 0
    # The ramp's planes stay in the cache by bands. The blur keeps only the rows in reach anyway,
    # and pays for them again in each band.
    share = -(-(y1 - y0) // parts)
    if plan.settings.feather_mode != "gaussian":
        step = min(BAND, share)
    elif parts == 1:
        step = share
    else:
        step = min(share, max(BAND, -(-share // 4)))
    run([_band(box, plan, out, y0, x0, a, min(a + step, y1 - y0)) for a in range(0, y1 - y0, step)])


def _band(
    box: np.ndarray, plan: Plan, out: np.ndarray, oy: int, ox: int, a: int, b: int
) -> Callable[[Scratch], None]:
    """Rows a..b of the bit planes `box` into `out` at (oy, ox)."""
    s, reach = plan.settings, plan.reach
    width = box.shape[1]
    height = min(64 * len(box), out.shape[0] - oy)
    cells = (b - a + 2 * reach) * width

    def task(own: Scratch) -> None:
        row = own.flat("row", width, np.uint8)
        if not s.feather:
            bits.unpack_float(box, out, row, a, b, oy, ox)
        elif s.feather_mode == "gaussian":
            for x0 in range(0, width, STRIP):
                _blur(box, plan, out, oy, ox, a, b, x0, min(x0 + STRIP, width), own)
        else:
            dtype = np.uint8 if reach <= 15 else np.uint16
            segments = -(-width // ramp.SEGMENT)
            rows = ((min(height, b + reach) - 1) >> 6) - (max(0, a - reach) >> 6) + 1
            scratch = (
                own.flat("plane", cells, np.uint8),
                own.flat("g", cells, dtype),
                own.flat("q", width + 2 * reach + ramp.ROUND, dtype),
                own.flat("acc", width + ramp.ROUND, dtype),
                own.flat("kinds", segments, np.uint8),
                own.plane("some", (rows, segments), np.uint64),
                own.plane("every", (rows, segments), np.uint64),
                row,
            )
            outside, inside = plan.tables
            if s.feather_mode != "ramp_in":
                ramp.ramp(box, height, a, b, reach, False, outside, False, *scratch, out, oy, ox)
            if s.feather_mode != "ramp_out":
                keep = s.feather_mode == "ramp_center"
                ramp.ramp(box, height, a, b, reach, True, inside, keep, *scratch, out, oy, ox)

    return task


def _blur(
    box: np.ndarray,
    plan: Plan,
    out: np.ndarray,
    oy: int,
    ox: int,
    y0: int,
    y1: int,
    x0: int,
    x1: int,
    scratch: Scratch,
) -> None:
    """Rows y0..y1 and columns x0..x1 of the bit planes `box`, blurred, into `out` at (oy, ox)."""
    s, reach = plan.settings, plan.reach
    left, right = max(0, x0 - reach), min(box.shape[1], x1 + reach)
    words = box if right - left == box.shape[1] else np.ascontiguousarray(box[:, left:right])
    narrow, wide = boxblur.exact_dtypes(s.widths)
    radii = tuple(w // 2 for w in s.widths)
    width, n = right - left, x1 - x0
    boxblur.triple_box(
        words,
        min(64 * len(box), out.shape[0] - oy),
        y0,
        y1,
        x0 - left,
        radii,
        plan.curve,
        boxblur.unit_scale(s.widths),
        scratch.plane("edges", (64, width), np.int32),
        scratch.flat("count", 64, np.int64),
        scratch.flat("strip", 2 * reach, narrow),
        scratch.flat("total", width + 2 * max(radii) + 1, narrow),
        scratch.plane("rows", (boxblur.ring_rows(radii[0]), width), narrow),
        scratch.plane("once", (boxblur.ring_rows(radii[1]), n), wide),
        scratch.plane("twice", (boxblur.ring_rows(radii[2]), n), wide),
        scratch.flat("sums", n, wide),
        scratch.flat("spare", n, wide),
        out,
        oy,
        ox + x0,
    )


def _soft_frame(frame: np.ndarray, plan: Plan, out: np.ndarray, scratch: Scratch) -> None:
    s = plan.settings
    height, width = frame.shape
    words = scratch.plane("words", (-(-height // 64), width), np.uint64)
    row = scratch.flat("row", width, np.uint8)
    value = frame = bounded(frame)
    if s.fill_holes or s.cleans_islands:
        value = scratch.plane("value", (height, width), np.float32)
        bits.copy_numbers(frame, value)
    if s.fill_holes:
        bits.pack(value, s.SOFT_FULL, words, row, 0, len(words))
        before = words.copy()
        components.clean(words, height, s.fill_holes, 0, 0)
        bits.paint(before, words, np.float32(1), value)
    if s.cleans_islands:
        bits.pack(value, s.SOFT_EMPTY, words, row, 0, len(words))
        before = words.copy()
        components.clean(words, height, 0, s.drop_islands, s.keep_largest)
        bits.paint(before, words, np.float32(0), value)
    if s.grow:
        radius = len(plan.heights) - 1
        source, target = value.view(np.int32), out.view(np.int32)
        flip = np.int32(0 if s.grow > 0 else -1)
        size = 2 * radius + 1
        lines = scratch.plane("lines", (2, width + 2 * radius), np.int32)
        line = scratch.flat("line", width, np.int32)
        if s.grow_shape == "square":
            blocks = scratch.plane("blocks", (2, size, width), np.int32)
            morphology.dilate_grey_square(source, radius, flip, blocks, lines, line, target)
        else:
            ring = scratch.plane("ring", (size, width), np.int32)
            near = scratch.plane("slots", (2, radius + 1), np.int64)
            morphology.dilate_grey(source, plan.stairs, flip, ring, lines, line, near, target)
    else:
        bits.copy_numbers(value, out)
    if s.feather:
        radii = tuple(w // 2 for w in s.widths)
        boxblur.soft_triple_box(
            out,
            radii,
            scratch.plane("value", (height, width), np.float32),
            scratch.flat("values", width, np.float64),
            scratch.flat("total", width + 2 * max(radii) + 1, np.float64),
            scratch.flat("sums", width, np.float64),
        )


def hull_frame(
    frame: np.ndarray, threshold: float, whole: bool, out: np.ndarray, scratch: Scratch
) -> None:
    """Hulls (of each region, or of all pixels if `whole`) of float32 [H, W] above `threshold`, as
    0.0 and 1.0 into `out`.
    """
    height, width = frame.shape
    words = scratch.plane("words", (-(-height // 64), width), np.uint64)
    found = scratch.plane("source", words.shape, np.uint64)
    row = scratch.flat("row", width, np.uint8)
    bits.pack(frame, np.float32(threshold), words, row, 0, len(words))
    found[:] = 0
    if whole:
        hull.hull_of_all(words, found)
    else:
        hull.hulls(words, height, False, found)
    bits.unpack_float(found, out, row, 0, height, 0, 0)


def _packed(frame: np.ndarray, threshold: float) -> np.ndarray:
    height, width = frame.shape
    words = np.empty((-(-height // 64), width), np.uint64)
    bits.pack(frame, np.float32(threshold), words, np.empty(width, np.uint8), 0, len(words))
    return words


def count_regions(frame: np.ndarray, threshold: float) -> int:
    """Number of 8-connected regions of float32 [H, W] above `threshold`."""
    return components.count_regions(_packed(frame, threshold), len(frame))


def box(frame: np.ndarray, threshold: float, share: int) -> tuple[int, int, int, int]:
    """See `components.box`, of what lies above `threshold` in float32 [H, W]."""
    return components.box(_packed(frame, threshold), len(frame), share)


def blend_frame(
    destination: np.ndarray,
    source: np.ndarray,
    mask: np.ndarray,
    y: int,
    x: int,
    out: np.ndarray,
    scratch: Scratch,
) -> None:
    """float32 [h, w, C] `source` blended into [H, W, C] `destination` at (y, x), into `out`."""
    height, _, channels = destination.shape
    weight = scratch.flat("weight", mask.shape[1] * channels, np.float32)
    blend.blend(
        destination.reshape(height, -1),
        source.reshape(len(source), -1),
        mask,
        channels,
        y,
        x,
        weight,
        out.reshape(height, -1),
    )


def smooth(frames: np.ndarray, mode: str, keep: float, out: np.ndarray, n0: int, n1: int) -> None:
    """Temporal smoothing of pixels n0..n1 of float32 [B, N] `frames` into `out`."""
    if mode in ("ema", "ema_both"):
        temporal.ema(frames, np.float32(keep), out, n0, n1)
        if mode == "ema_both":
            temporal.ema_back(out, np.float32(keep), n0, n1)
    elif mode == "union":
        temporal.union(frames, out, n0, n1)
    else:
        temporal.median(frames, 1 if mode == "median3" else 2, out, n0, n1)
