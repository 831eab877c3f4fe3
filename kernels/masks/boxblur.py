"""Gaussian feather: three box filters in exact integers, from bit planes.

Kovesi, "Fast Almost-Gaussian Filtering", 2010: three boxes of two odd widths have the standard
deviation asked for to within a fraction of a pixel. Each pass repeats the edge values, on both
axes, exactly like three calls of `scipy.ndimage.uniform_filter(mode="nearest")`; sums are exact,
so there is no drift and no rounding before the end.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit
from .bits import unpack_bytes


def exact_dtypes(widths: tuple[int, int, int]) -> tuple[type, type, type]:
    """Smallest unsigned dtypes whose sums stay exact: first vertical box, all three, and all six
    boxes.
    """
    product = widths[0] * widths[1] * widths[2]
    narrow = np.uint8 if max(widths) <= 0xFF else np.uint16
    if product <= 0xFFFF:
        return narrow, np.uint16, np.uint32
    return narrow, np.uint32, np.uint64


def unit_scale(widths: tuple[int, int, int]) -> np.float32:
    """Factor that turns the full sum into 1; one step up, so that a full window reaches 1 before
    it is cut there.
    """
    full = float(widths[0] * widths[1] * widths[2]) ** 2
    return np.nextafter(np.float32(1 / full), np.float32(1))


@njit
def box_columns(source, s0, target, t0, t1, r, height):
    """Vertical box sums of half width r for rows t0..t1 into `target`, whose first row is row t0.

    `source` (same integer dtype, first row s0) holds every row in reach that exists; past the
    picture its first and last rows repeat. Sums are exact while 2 r + 1 times the largest value
    fits the dtype.
    """
    small = target.dtype.type
    width = source.shape[1]
    first = target[0]
    for x in range(width):
        first[x] = small(0)
    for n in range(t0 - r, t0 + r + 1):
        entering = source[min(max(n, 0), height - 1) - s0]
        for x in range(width):
            first[x] = small(first[x] + entering[x])
    for y in range(t0 + 1, t1):
        entering = source[min(y + r, height - 1) - s0]
        leaving = source[max(y - r - 1, 0) - s0]
        before, now = target[y - 1 - t0], target[y - t0]
        for x in range(width):
            now[x] = small(before[x] + small(entering[x] - leaving[x]))


@njit
def box_row(values, total, r):
    """Box sums of half width r along `values` [n], in place; end values repeat. `total`: scratch
    [n + 2 r + 1].
    """
    wide = values.dtype.type
    n = values.shape[0]
    head, tail = values[0], values[n - 1]
    sum_ = wide(0)
    total[0] = sum_
    for i in range(r):
        sum_ = wide(sum_ + head)
        total[i + 1] = sum_
    middle = total[r + 1 : r + 1 + n]
    for i in range(n):
        sum_ = wide(sum_ + values[i])
        middle[i] = sum_
    for i in range(r):
        sum_ = wide(sum_ + tail)
        total[r + n + 1 + i] = sum_
    late, early = total[2 * r + 1 : 2 * r + 1 + n], total[:n]
    for i in range(n):
        values[i] = wide(late[i] - early[i])


@njit
def level_span(row):
    """Where `row` changes: length of its constant head, and start of its constant tail (0 if it
    never changes).
    """
    n = row.shape[0]
    head = 1
    while head < n and row[head] == row[0]:
        head += 1
    tail = n - 1
    while tail > 0 and row[tail - 1] == row[n - 1]:
        tail -= 1
    return head, tail


@njit
def triple_box(
    words, height, y0, y1, radii, scale, narrow, medium, values, total, row, out, oy, ox
):
    """Rows y0..y1 of the 0/1 picture `words` under three box filters of half widths `radii`, at
    (oy, ox) of `out`.

    scale: `unit_scale`. Scratch in the dtypes N, M, V of `exact_dtypes`: narrow N and medium M,
    flat, with 2 planes of (y1 - y0 + 2 sum(radii)) W cells each; values V [W]; total V [W + 2
    max(radii) + 1]; row uint8 [W].
    """
    width = words.shape[1]
    ra, rb, rc = radii
    b0, b1 = max(0, y0 - rc), min(height, y1 + rc)
    a0, a1 = max(0, b0 - rb), min(height, b1 + rb)
    s0, s1 = max(0, a0 - ra), min(height, a1 + ra)
    half_n, half_m = narrow.shape[0] // 2, medium.shape[0] // 2
    bits = narrow[: (s1 - s0) * width].reshape((s1 - s0, width))
    sums = narrow[half_n : half_n + (a1 - a0) * width].reshape((a1 - a0, width))
    once = medium[: (a1 - a0) * width].reshape((a1 - a0, width))
    twice = medium[half_m : half_m + (b1 - b0) * width].reshape((b1 - b0, width))
    thrice = medium[: (y1 - y0) * width].reshape((y1 - y0, width))
    unpack_bytes(words, bits, 0, 1, row, s0, s1)
    box_columns(bits, s0, sums, a0, a1, ra, height)
    for y in range(a1 - a0):  # widening apart from the sums keeps both loops at full SIMD width
        source, target = sums[y], once[y]
        for x in range(width):
            target[x] = source[x]
    box_columns(once, a0, twice, b0, b1, rb, height)
    box_columns(twice, b0, thrice, y0, y1, rc, height)
    wide = values.dtype.type
    area = wide((2 * ra + 1) * (2 * rb + 1) * (2 * rc + 1))
    spread = ra + rb + rc
    one = np.float32(1)
    for y in range(y0, y1):
        sums_y, target = thrice[y - y0], out[y + oy, ox : ox + width]
        head, tail = level_span(sums_y)
        x0, x1 = max(0, head - spread), min(width, tail + spread)
        if head == width:
            x0, x1 = 0, 0
        for x in range(x0):
            values[x] = wide(wide(sums_y[x]) * area)
        for x in range(x1, width):
            values[x] = wide(wide(sums_y[x]) * area)
        if x1 > x0:
            span, changing = values[x0:x1], sums_y[x0:x1]
            for x in range(span.shape[0]):
                span[x] = wide(changing[x])
            box_row(span, total, ra)
            box_row(span, total, rb)
            box_row(span, total, rc)
        for x in range(width):
            target[x] = min(np.float32(np.float32(values[x]) * scale), one)


@njit
def soft_columns(source, target, r, sums):
    """Vertical mean of half width r over float32 [H, W], edge rows repeated. `sums`: float64 [W]
    scratch.
    """
    height, width = source.shape
    share = 1.0 / (2 * r + 1)
    for x in range(width):
        sums[x] = 0.0
    for n in range(-r, r + 1):
        row = source[min(max(n, 0), height - 1)]
        for x in range(width):
            sums[x] += row[x]
    for y in range(height):
        now = target[y]
        entering, leaving = source[min(y + r + 1, height - 1)], source[max(y - r, 0)]
        for x in range(width):
            now[x] = np.float32(sums[x] * share)
            sums[x] += np.float64(entering[x]) - np.float64(leaving[x])


@njit
def soft_triple_box(image, radii, spare, values, total, sums):
    """Three box filters over float32 [H, W] `image`, in place, accumulated in float64.

    Scratch: spare float32 [H, W]; values float64 [W]; total float64 [W + 2 max(radii) + 1]; sums
    float64 [W].
    """
    width = image.shape[1]
    ra, rb, rc = radii
    soft_columns(image, spare, ra, sums)
    soft_columns(spare, image, rb, sums)
    soft_columns(image, spare, rc, sums)
    share = 1.0 / ((2 * ra + 1) * (2 * rb + 1) * (2 * rc + 1))
    for y in range(image.shape[0]):
        source, target = spare[y], image[y]
        for x in range(width):
            values[x] = source[x]
        box_row(values, total, ra)
        box_row(values, total, rb)
        box_row(values, total, rc)
        for x in range(width):
            target[x] = min(max(np.float32(values[x] * share), np.float32(0)), np.float32(1))
