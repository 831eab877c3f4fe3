"""The chain in NumPy and SciPy: what runs when Numba is missing, and what the Numba kernels are
tested against.

Every function takes and returns one frame, float32 or bool [H, W], unless it says otherwise.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from .agnostic import AgnosticSettings
    from .settings import RefineSettings

EIGHT = np.ones((3, 3), bool)
CROSS = ndimage.generate_binary_structure(2, 1)


def label(bits: np.ndarray, structure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Region numbers from 1 (0 where `bits` is False), int [H, W], and the px of each number."""
    labels = np.empty(bits.shape, np.int32)
    count = ndimage.label(bits, structure, output=labels)
    return labels, np.bincount(labels.ravel(), minlength=int(count) + 1)  # pyright: ignore


def fill_holes(bits: np.ndarray, max_hole: int) -> np.ndarray:
    """Fill 4-connected background regions that do not touch the border and hold at most `max_hole`
    px (-1: any).
    """
    labels, area = label(~bits, CROSS)
    hole = np.ones(len(area), bool) if max_hole < 0 else area <= max_hole
    hole[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    hole[0] = False
    return bits | hole[labels]


def drop_islands(bits: np.ndarray, min_island: int, keep: int) -> np.ndarray:
    """Clear 8-connected regions below `min_island` px, then all but the `keep` largest (0: all
    stay).

    Among equal areas the region whose first pixel comes first, column by column, is kept.
    """
    labels, area = label(bits, EIGHT)
    stays = area >= min_island
    stays[0] = False
    if keep > 0:
        found, first = np.unique(labels.T, return_index=True)
        order = sorted((-area[n], at, n) for n, at in zip(found, first, strict=True) if stays[n])
        stays[:] = False
        stays[[n for _, _, n in order[:keep]]] = True
    return stays[labels]


def element(shape: str, radius: int) -> np.ndarray:
    """Structuring element of "disk", "diamond" or "square", bool [2 radius + 1, 2 radius + 1]."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "disk":
        return y * y + x * x <= radius * radius
    if shape == "diamond":
        return abs(y) + abs(x) <= radius
    return np.ones((2 * radius + 1, 2 * radius + 1), bool)


def squared_distance(target: np.ndarray) -> np.ndarray:
    """Exact squared Euclidean distance (int64) of every pixel to the nearest True; huge where
    there is none.
    """
    if not target.any():
        return np.full(target.shape, np.iinfo(np.int64).max // 2)
    nearest = np.empty((2, *target.shape), np.int32)
    ndimage.distance_transform_edt(
        ~target, return_distances=False, return_indices=True, indices=nearest
    )
    y, x = nearest
    rows, columns = np.indices(target.shape)
    return (y - rows).astype(np.int64) ** 2 + (x - columns).astype(np.int64) ** 2


def grow_bits(bits: np.ndarray, shape: str, grow: int) -> np.ndarray:
    """Dilate (grow > 0) or erode (grow < 0) by |grow| px; outside the picture is left out."""
    if grow < 0:
        return ~grow_bits(~bits, shape, -grow)
    if shape == "disk":
        return squared_distance(bits) <= grow * grow
    if shape == "square":
        return ndimage.maximum_filter(bits, 2 * grow + 1, mode="constant", cval=False)
    return ndimage.binary_dilation(bits, CROSS, iterations=grow) if grow else bits.copy()


def grow_soft(mask: np.ndarray, shape: str, grow: int) -> np.ndarray:
    """Grey dilation or erosion of float32 values by |grow| px; outside the picture is left out."""
    if grow < 0:
        return -grow_soft(-mask, shape, -grow)
    if shape == "square":
        return ndimage.maximum_filter(mask, 2 * grow + 1, mode="constant", cval=-np.inf)
    if shape == "diamond":
        for _ in range(grow):
            mask = ndimage.grey_dilation(mask, footprint=CROSS)
        return mask
    return ndimage.maximum_filter(
        mask, footprint=element(shape, grow), mode="constant", cval=-np.inf
    )


def ramp(bits: np.ndarray, feather: float, mode: str) -> np.ndarray:
    """Distance ramp, float32; the formulas are in `settings.ramp_table`."""
    outside, inside = np.sqrt(squared_distance(bits)), np.sqrt(squared_distance(~bits))
    if mode == "ramp_out":
        value = np.where(bits, 1, 1 - outside / feather)
    elif mode == "ramp_in":
        value = np.where(bits, inside / feather, 0)
    else:
        value = 0.5 + np.where(bits, inside - 0.5, 0.5 - outside) / feather
    return np.clip(value, 0, 1).astype(np.float32)


def triple_box(mask: np.ndarray, widths: tuple[int, int, int]) -> np.ndarray:
    """Three box filters of the given odd widths with edge values repeated, accumulated in float64,
    float32 out.
    """
    value = mask.astype(np.float64)
    for width in widths:
        value = ndimage.uniform_filter(value, width, mode="nearest")
    return np.clip(value, 0, 1).astype(np.float32)


def smooth(frames: np.ndarray, mode: str, keep: float) -> np.ndarray:
    """Temporal smoothing of float32 [B, H, W] without NaN; modes of `settings.TEMPORAL` other than
    "off".
    """
    if mode == "union":
        return np.broadcast_to(frames.max(axis=0), frames.shape).copy()
    if mode in ("ema", "ema_both"):
        out, kept = frames.copy(), np.float32(keep)
        share = np.float32(1) - kept
        for t in range(1, len(out)):
            out[t] = kept * out[t - 1] + share * out[t]
        for t in range(len(out) - 2, -1, -1) if mode == "ema_both" else ():
            out[t] = kept * out[t + 1] + share * out[t]
        return out
    size = 3 if mode == "median3" else 5
    return ndimage.median_filter(frames, (size, 1, 1), mode="nearest")


def refine_frame(frame: np.ndarray, settings: RefineSettings, out: np.ndarray) -> None:
    """All steps after temporal smoothing, for one frame without NaN, into float32 [H, W] `out`."""
    s = settings
    if s.soft:
        value = frame.copy()
        if s.fill_holes:
            solid = value >= s.SOFT_FULL
            value[fill_holes(solid, s.fill_holes) & ~solid] = 1
        if s.cleans_islands:
            visible = value > s.SOFT_EMPTY
            value[visible & ~drop_islands(visible, s.drop_islands, s.keep_largest)] = 0
        if s.grow:
            value = grow_soft(value, s.grow_shape, s.grow)
        out[:] = triple_box(value, s.widths) if s.feather else value
        return
    bits = frame > np.float32(s.threshold)
    if s.fill_holes:
        bits = fill_holes(bits, s.fill_holes)
    if s.cleans_islands:
        bits = drop_islands(bits, s.drop_islands, s.keep_largest)
    if s.grow:
        bits = grow_bits(bits, s.grow_shape, s.grow)
    if not s.feather:
        out[:] = bits
    elif s.feather_mode == "gaussian":
        out[:] = triple_box(bits, s.widths)
    else:
        out[:] = ramp(bits, s.feather, s.feather_mode)


def hull_bits(bits: np.ndarray, outlined: bool) -> np.ndarray:
    """Convex hull of all True pixels: the pixels whose centre lies in it or on its edge, and, if
    outlined, those nearest to its edges, one for each step along an edge's longer axis.
    """
    columns = np.flatnonzero(bits.any(axis=0))
    out = np.zeros_like(bits)
    if not columns.size:
        return out
    top = bits.argmax(axis=0)[columns]
    bottom = len(bits) - 1 - bits[::-1].argmax(axis=0)[columns]
    x = np.arange(columns[0], columns[-1] + 1)
    sides = _hull_corners(columns, top, 1), _hull_corners(columns, bottom, -1)
    upper, lower = _hull_edge(sides[0], 1, x), _hull_edge(sides[1], -1, x)
    rows = np.arange(len(bits))[:, None]
    out[:, x] = (rows >= upper) & (rows <= lower)
    for corners in sides if outlined else ():
        for (ax, ay), (bx, by) in itertools.pairwise(corners):
            steps = max(bx - ax, abs(by - ay))
            near = (2 * np.outer((by - ay, bx - ax), np.arange(steps)) + steps) // (2 * steps)
            out[ay + near[0], ax + near[1]] = True
    return out


def _hull_corners(columns: np.ndarray, edge: np.ndarray, sign: int) -> list[tuple[int, int]]:
    """Corners (x, y) of one side of a hull, from left to right."""
    corners: list[tuple[int, int]] = []
    for point in zip(columns.tolist(), edge.tolist(), strict=True):
        while len(corners) >= 2:
            (ax, ay), (bx, by) = corners[-2], corners[-1]
            if sign * ((bx - ax) * (point[1] - ay) - (by - ay) * (point[0] - ax)) > 0:
                break
            corners.pop()
        corners.append(point)
    return corners


def _hull_edge(corners: list[tuple[int, int]], sign: int, x: np.ndarray) -> np.ndarray:
    """Rows of one side of a hull at the columns x, rounded into the hull."""
    rows = np.empty(len(x), np.int64)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] or corners, strict=False):
        span, run = np.arange(ax, bx + 1), max(1, bx - ax)
        step = (by - ay) * (span - ax)
        rows[span - x[0]] = ay - (-step) // run if sign > 0 else ay + step // run
    return rows


def hull_frame(bits: np.ndarray, whole: bool, outlined: bool = False) -> np.ndarray:
    """Hull of all True pixels, or the union of the hulls of the 8-connected regions."""
    if whole:
        return hull_bits(bits, outlined)
    labels, _ = label(bits, EIGHT)
    out = np.zeros_like(bits)
    for n, box in enumerate(ndimage.find_objects(labels), 1):
        out[box] |= hull_bits(labels[box] == n, outlined)
    return out


def count_regions(frame: np.ndarray, threshold: float) -> int:
    """Number of 8-connected regions of float32 [H, W] above `threshold`."""
    return int(label(frame > np.float32(threshold), EIGHT)[0].max())


def blend(
    destination: np.ndarray, source: np.ndarray, mask: np.ndarray, y: int, x: int
) -> np.ndarray:
    """float32 [H, W, C] `destination` with [h, w, C] `source` blended in at (y, x) through [h, w]
    `mask`.
    """
    out = destination.copy()
    height, width = destination.shape[:2]
    y0, y1 = max(0, y), min(height, y + mask.shape[0])
    x0, x1 = max(0, x), min(width, x + mask.shape[1])
    if y0 < y1 and x0 < x1:
        weight = np.nan_to_num(mask[y0 - y : y1 - y, x0 - x : x1 - x, None])
        over, below = source[y0 - y : y1 - y, x0 - x : x1 - x], destination[y0:y1, x0:x1]
        mixed = weight * over + (np.float32(1) - weight) * below
        out[y0:y1, x0:x1] = np.where(weight == 0, below, mixed)
    return out


def agnostic_frame(maps, tables, settings: AgnosticSettings) -> np.ndarray:
    """Agnostic mask bool [H, W] from DensePose, LIP and ATR labels uint8 [H, W]; the rules are
    those of `agnostic`.
    """
    from . import agnostic as rules

    height, width = maps[0].shape
    d, k = settings.sizes(height, width)
    flags = tables[0][maps[0]] | tables[1][maps[1]] | tables[2][maps[2]]

    def having(bit: int) -> np.ndarray:
        return (flags & bit) != 0

    ends = grow_bits(having(rules.EXTREMITY), "square", d // 2)
    strong = (ends & having(rules.LIMB)) | having(rules.FACE)
    weak = strong | having(rules.WEAK)
    quarter = (tables[0][maps[0][::4, ::4]] & rules.DENSE) != 0
    quarter = grow_bits(quarter, "square", d - 1)
    dense = np.kron(quarter, np.ones((4, 4), bool))[:height, :width]
    mask = (having(rules.PERSON) & ~weak) | dense
    if settings.hull == "per_region":
        mask = hull_frame(mask, whole=False, outlined=True)
    elif settings.hull == "closing":
        mask = grow_bits(grow_bits(mask, "disk", settings.radius), "disk", -settings.radius)
    mask &= ~weak
    taps, least = rules.integer_taps(k)
    total = mask.astype(np.int64)
    both = np.concatenate([taps[-2:0:-1], taps[:-1]]).astype(np.int64)
    for axis in (0, 1):
        total = ndimage.correlate1d(total, both, axis, mode="mirror")
    mask = ((total >= least) | having(rules.CLOTHES)) & ~strong
    return grow_bits(mask, "square", d // 2)


def box(frame: np.ndarray, threshold: float, share: int) -> tuple[int, int, int, int]:
    """See `components.box`, of what lies above `threshold` in float32 [H, W]."""
    named, area = label(frame > np.float32(threshold), EIGHT)
    if not area[1:].any():
        return 0, 0, 0, 0
    counts = area * share >= area[1:].max()
    counts[0] = False
    rows, columns = np.nonzero(counts[named])
    x, y = int(columns.min()), int(rows.min())
    return x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1
