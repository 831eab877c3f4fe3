"""Dilation and erosion by a disk, diamond or square: on bit planes and on grey values.

A structuring element is its column profile: int64 [R + 1], profile[d] = half height at column
offset d, falling or level in d. Disk: isqrt(R^2 - d^2), which is "Euclidean distance <= R"
exactly. Diamond: R - d. Square: R. Everything outside the picture is left out, for erosion too
(SciPy's and ComfyUI's rule).
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import leaf
from .bits import assign, valid_bits

LOWEST = np.int32(-(2**31))
# Spans with fewer empty columns between them are dilated as one.
GAP = 32


def profile(shape: str, radius: int) -> np.ndarray:
    """Column profile, int64 [radius + 1], of a "disk", "diamond" or "square" of `radius` px."""
    if shape == "disk":
        heights = [math.isqrt(radius * radius - d * d) for d in range(radius + 1)]
    elif shape == "diamond":
        heights = [radius - d for d in range(radius + 1)]
    else:
        heights = [radius] * (radius + 1)
    return np.array(heights, np.int64)


@leaf
def or_shifted(out, v, d, radius, x0, x1):
    """OR `v` moved by d columns to both sides into out[x0:x1]; `v` carries `radius` empty columns
    on each side.
    """
    left = v[radius - d + x0 : radius - d + x1]
    right = v[radius + d + x0 : radius + d + x1]
    target = out[x0:x1]
    for x in range(target.shape[0]):
        target[x] |= left[x] | right[x]


@leaf
def or_two_shifted(out, v, d, radius, x0, x1):
    """`or_shifted` by d and by d - 1 columns in one pass."""
    left = v[radius - d + x0 : radius - d + x1]
    left2 = v[radius - d + 1 + x0 : radius - d + 1 + x1]
    right = v[radius + d + x0 : radius + d + x1]
    right2 = v[radius + d - 1 + x0 : radius + d - 1 + x1]
    target = out[x0:x1]
    for x in range(target.shape[0]):
        target[x] |= (left[x] | left2[x]) | (right[x] | right2[x])


@leaf
def widen_by_two(v, source, k, n, radius, x0, x1):
    """`widen` by n and by n + 1 rows in one pass; neither is a whole number of words."""
    q, s = n >> 6, np.uint64(n & 63)
    target = v[radius + x0 : radius + x1]
    above, below = source[k - q, x0:x1], source[k + q, x0:x1]
    above2, below2 = source[k - q - 1, x0:x1], source[k + q + 1, x0:x1]
    more, back, less = s + np.uint64(1), np.uint64(64) - s, np.uint64(63) - s
    for x in range(target.shape[0]):
        near = (above[x] << s) | (above2[x] >> back) | (below[x] >> s) | (below2[x] << back)
        far = (above[x] << more) | (above2[x] >> less) | (below[x] >> more) | (below2[x] << less)
        target[x] |= near | far


@leaf
def widen(v, source, k, n, radius, x0, x1):
    """OR word row k of `source` moved by n rows up and down into `v`: a funnel shift over
    neighbouring words.
    """
    q, s = n >> 6, np.uint64(n & 63)
    target = v[radius + x0 : radius + x1]
    above, below = source[k - q, x0:x1], source[k + q, x0:x1]
    if s == np.uint64(0):  # a shift by 64 is undefined, so whole words move apart from the rest
        for x in range(target.shape[0]):
            target[x] |= above[x] | below[x]
    else:
        back = np.uint64(64) - s
        above2, below2 = source[k - q - 1, x0:x1], source[k + q + 1, x0:x1]
        for x in range(target.shape[0]):
            target[x] |= (
                (above[x] << s) | (above2[x] >> back) | (below[x] >> s) | (below2[x] << back)
            )


@leaf
def join_rows(source, first, last, out):
    """OR of word rows first..last of `source` into `out` [W]."""
    assign(source[first], out)
    for k in range(first + 1, last + 1):
        add_bits(source[k], out)


@leaf
def add_bits(source, out):
    for x in range(out.shape[0]):
        out[x] |= source[x]


@leaf
def dilate_span(source, heights, k, v, row, xa, xb):
    """OR columns xa..xb of word row k of `source`, dilated by `heights`, into `row` [W]."""
    radius = heights.shape[0] - 1
    width = row.shape[0]
    v[max(0, xa - radius) : xb + 3 * radius] = np.uint64(0)
    assign(source[k, xa:xb], v[radius + xa : radius + xb])
    d = radius
    h = 0
    while True:
        while d >= 0 and heights[d] == h:
            x0, x1 = max(0, xa - d), min(width, xb + d)
            if d >= 1 and heights[d - 1] == h:
                or_two_shifted(row, v, d, radius, x0, x1)
                d -= 2
            else:
                or_shifted(row, v, d, radius, x0, x1)
                d -= 1
        if d < 0:
            break
        if heights[d] >= h + 2 and 1 <= (h + 1) & 63 <= 62:
            widen_by_two(v, source, k, h + 1, radius, xa, xb)
            h += 2
        else:
            h += 1
            widen(v, source, k, h, radius, xa, xb)


@leaf
def dilate_bits(source, heights, near, v, out, height, k0, k1):
    """Dilate bit planes by the element `heights` (radius R = len - 1): word rows k0..k1 of `out`,
    uint64 [K, W].

    source: uint64 [K + 2 P, W] with P = 2 + R // 64 zero word rows above and below. Only spans of
    columns with a pixel in reach are worked on. Scratch, uint64: near [W], v [W + 2 R].
    """
    width = out.shape[1]
    pad = 2 + (heights.shape[0] - 1) // 64
    reach = (heights[0] >> 6) + 1
    for k in range(k0, k1):
        row = out[k]
        row[:] = np.uint64(0)
        join_rows(source, k + pad - reach, k + pad + reach, near)
        x = 0
        while x < width:
            while x < width and near[x] == np.uint64(0):
                x += 1
            if x == width:
                break
            xa, xb = x, x + 1
            while x < width and x - xb < GAP:
                if near[x] != np.uint64(0):
                    xb = x + 1
                x += 1
            dilate_span(source, heights, k + pad, v, row, xa, xb)
    if k1 == out.shape[0]:
        keep = valid_bits(k1 - 1, height)
        row = out[k1 - 1]
        for x in range(width):
            row[x] &= keep


@leaf
def key(bits):
    """Order-preserving integer of a float32's bits (int32), and back: it is its own inverse."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@leaf
def larger(first, second, out):
    """Elementwise maximum of two rows."""
    for x in range(out.shape[0]):
        out[x] = max(first[x], second[x])


@leaf
def raise_to(first, second, out):
    """Raise `out` to the maximum of two rows."""
    for x in range(out.shape[0]):
        out[x] = max(max(first[x], second[x]), out[x])


@leaf
def raise_to_four(a, b, c, d, out):
    """Raise `out` to the maximum of four rows."""
    for x in range(out.shape[0]):
        out[x] = max(max(max(a[x], b[x]), max(c[x], d[x])), out[x])


@leaf
def window_maxima(row, flip, level, radius):
    """Keys of `row` and their maxima over windows of 1, 2, 4, .. columns into int32 `level`.

    level: [levels, W + 2 R]; columns past the picture count as lowest.
    """
    width = row.shape[0]
    base = level[0]
    base[:radius] = LOWEST
    base[radius + width :] = LOWEST
    middle = base[radius : radius + width]
    for x in range(width):
        middle[x] = key(row[x]) ^ flip
    span = 1
    for p in range(1, level.shape[0]):
        finer, coarser = level[p - 1], level[p]
        length = base.shape[0] - 2 * span + 1
        larger(finer[:length], finer[span : span + length], coarser[:length])
        span *= 2


@leaf
def dilate_grey(image, heights, flip, ring, out):
    """Grey dilation (flip 0) or erosion (flip -1) of [H, W] `image` by `heights`; exact.

    image and out are float32 values seen as int32: integers in the same order take the same
    maxima, and LLVM turns a float maximum that updates its own row into branches.
    ring: scratch, int32 [2 R + 1, floor(log2(2 R + 1)) + 1, W + 2 R]: the window maxima of the
    rows in reach. Each output row takes, for every row offset, the maximum of two overlapping
    power-of-two windows, of the rows above and below in one pass.
    """
    height, width = image.shape
    radius = heights.shape[0] - 1
    slots = ring.shape[0]
    ready = 0
    for y in range(height):
        while ready < min(height, y + radius + 1):
            window_maxima(image[ready], flip, ring[ready % slots], radius)
            ready += 1
        row = out[y]
        row[:] = LOWEST
        for d in range(radius + 1):
            half = heights[d]
            p, span = 0, 1
            while 2 * span <= 2 * half + 1:
                p, span = p + 1, 2 * span
            first, second = radius - half, radius + half + 1 - span
            if 0 < d <= min(y, height - 1 - y):
                up, down = ring[(y - d) % slots, p], ring[(y + d) % slots, p]
                raise_to_four(
                    up[first : first + width],
                    up[second : second + width],
                    down[first : first + width],
                    down[second : second + width],
                    row,
                )
            elif y >= d or y + d < height:
                level = ring[(y - d if y >= d else y + d) % slots, p]
                raise_to(level[first : first + width], level[second : second + width], row)
        for x in range(width):
            row[x] = key(row[x] ^ flip)
