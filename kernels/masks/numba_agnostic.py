"""The agnostic mask of one frame on bit planes; the rules are those of `agnostic`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import agnostic, bits, boxblur, flags, hull, morphology
from .numba_chain import Scratch, dilate


def _grown(words: np.ndarray, height: int, shape: str, radius: int, scratch: Scratch) -> np.ndarray:
    def run(tasks: Sequence[Callable[[Scratch], None]]) -> None:
        for task in tasks:
            task(scratch)

    out = words.copy()
    if radius:
        dilate(out, height, morphology.profile(shape, radius), scratch, 1, run)
    return out


def _shrunk(
    words: np.ndarray, height: int, shape: str, radius: int, scratch: Scratch
) -> np.ndarray:
    out = words.copy()
    bits.complement(out, height)
    out = _grown(out, height, shape, radius, scratch)
    bits.complement(out, height)
    return out


def _dense(labels: np.ndarray, table: np.ndarray, d: int, scratch: Scratch) -> np.ndarray:
    """The DensePose parts, coarse: every 4th pixel, dilated by d twice, enlarged again."""
    height, width = labels.shape
    small = (table[labels[::4, ::4]] & agnostic.DENSE).astype(np.float32)
    rows, columns = small.shape
    words = np.empty((-(-rows // 64), columns), np.uint64)
    bits.pack(small, np.float32(0), words, np.empty(columns, np.uint8), 0, len(words))
    out = np.empty((-(-height // 64), width), np.uint64)
    flags.enlarge(_grown(words, rows, "square", d - 1, scratch), height, out)
    return out


def _certain(taps: np.ndarray, least: int) -> tuple[int, int]:
    """Radii of squares that decide a pixel's bit without a blur: 0 where the mask has no pixel in
    the first, 1 where it has all of the second.
    """
    mass = int(taps[0]) + 2 * np.cumsum([0, *taps[1:-1].tolist()], dtype=np.int64)
    every = int(mass[-1]) ** 2
    clear = int(np.argmax(every - mass**2 < least))
    return clear, int(np.argmax(mass**2 >= least))


def _blurred(
    words: np.ndarray, height: int, taps: np.ndarray, least: int, scratch: Scratch
) -> np.ndarray:
    width, r = words.shape[1], len(taps) - 2
    clear, full = _certain(taps, least)
    band = _grown(words, height, "square", clear, scratch)
    band &= ~_shrunk(words, height, "square", full, scratch)
    padded = np.ascontiguousarray(words[:, agnostic.mirrored(width, r)])
    sides = taps[1:-1]
    kernel = np.concatenate([sides[::-1], taps[:1], sides])
    out = words.copy()
    flags.blur_threshold(
        padded,
        height,
        band,
        taps,
        np.cumsum(kernel).astype(np.uint16),
        np.uint32(least),
        scratch.plane("edges", (64, width + 2 * r), np.int32),
        scratch.flat("count", 64, np.int64),
        scratch.plane("ring16", (boxblur.ring_rows(r + 5), width + 2 * r + flags.ROUND), np.uint16),
        scratch.plane("near", (2 * bits.BYTE, r + 2), np.int64),
        scratch.flat("total32", width + flags.ROUND, np.uint32),
        out,
    )
    return out


def agnostic_frame(
    maps: tuple[np.ndarray, np.ndarray, np.ndarray],
    tables: tuple[np.ndarray, np.ndarray, np.ndarray],
    settings: agnostic.AgnosticSettings,
    out: np.ndarray,
    scratch: Scratch,
) -> None:
    """DensePose, LIP and ATR labels uint8 [H, W] to the mask of 0 and 1, into float32 [H, W]."""
    height, width = out.shape
    d, k = settings.sizes(height, width)
    planes = scratch.plane("planes", (flags.PLANES, -(-height // 64), width), np.uint64)
    packed = scratch.flat("packed", width, np.uint64)
    rows = scratch.plane("rows8", (bits.BYTE, width), np.uint8)
    flags.pack_flags(*maps, np.stack(tables), planes, rows, packed)
    ends, limb, face, weak, clothes, person = planes[:6]
    strong = (_grown(ends, height, "square", d // 2, scratch) & limb) | face
    weak |= strong
    mask = (person & ~weak) | _dense(maps[0], tables[0], d, scratch)
    if settings.hull == "per_region":
        found = np.zeros_like(mask)
        hull.hulls(mask, height, True, found)
        mask = found
    elif settings.hull == "closing":
        mask = _grown(mask, height, "disk", settings.radius, scratch)
        mask = _shrunk(mask, height, "disk", settings.radius, scratch)
    mask &= ~weak
    taps, least = agnostic.integer_taps(k)
    mask = _blurred(mask, height, taps, least, scratch)
    mask |= clothes
    mask &= ~strong
    mask = _grown(mask, height, "square", d // 2, scratch)
    bits.unpack_float(mask, out, rows[0], 0, height, 0, 0)
