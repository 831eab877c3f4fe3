"""Dilation and erosion by a disk, diamond or square: on bit planes and on grey values.

A structuring element is its column profile: int64 [R + 1], profile[d] = half height at column
offset d, falling or level in d. Disk: isqrt(R^2 - d^2), which is "Euclidean distance <= R"
exactly. Diamond: R - d. Square: R. Everything outside the picture is left out, for erosion too
(SciPy's and ComfyUI's rule).
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import njit_no_refcount
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


def stairs(heights: np.ndarray) -> np.ndarray:
    """The element as rectangles, half height and half width, int64 [n, 2]: from the widest to the
    tallest.
    """
    found: list[tuple[int, int]] = []
    for tall in range(int(heights[0]) + 1):
        wide = int(np.flatnonzero(heights >= tall)[-1])
        if found and found[-1][1] == wide:
            found.pop()
        found.append((tall, wide))
    return np.array(found, np.int64)


@njit_no_refcount
def or_shifted(out, v, d, radius, x0, x1):
    """OR `v` moved by d columns to both sides into out[x0:x1]; `v` carries `radius` empty columns
    on each side.
    """
    left = v[radius - d + x0 : radius - d + x1]
    right = v[radius + d + x0 : radius + d + x1]
    target = out[x0:x1]
    for x in range(target.shape[0]):
        target[x] |= left[x] | right[x]


@njit_no_refcount
def or_two_shifted(out, v, d, radius, x0, x1):
    """`or_shifted` by d and by d - 1 columns in one pass."""
    left = v[radius - d + x0 : radius - d + x1]
    left2 = v[radius - d + 1 + x0 : radius - d + 1 + x1]
    right = v[radius + d + x0 : radius + d + x1]
    right2 = v[radius + d - 1 + x0 : radius + d - 1 + x1]
    target = out[x0:x1]
    for x in range(target.shape[0]):
        target[x] |= (left[x] | left2[x]) | (right[x] | right2[x])


@njit_no_refcount
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


@njit_no_refcount
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


@njit_no_refcount
def join_rows(source, first, last, out):
    """OR of word rows first..last of `source` into `out` [W]."""
    assign(source[first], out)
    for k in range(first + 1, last + 1):
        add_bits(source[k], out)


@njit_no_refcount
def add_bits(source, out):
    """OR a word row into another."""
    for x in range(out.shape[0]):
        out[x] |= source[x]


@njit_no_refcount
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


@njit_no_refcount
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


@njit_no_refcount
def key(bits):
    """Order-preserving integer of a float32's bits (int32), and back: it is its own inverse."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@njit_no_refcount
def keys(row, flip, out):
    """Keys of a row of float32 bits, NaN as 0; flipped, a maximum of them is a minimum."""
    zero, most, infinity = np.int32(0), np.int32(0x7FFFFFFF), np.int32(0x7F800000)
    for x in range(out.shape[0]):
        value = zero if np.int32(row[x] & most) > infinity else row[x]
        out[x] = key(value) ^ flip


@njit_no_refcount
def values(row, flip, out):
    """What `keys` were made from."""
    for x in range(out.shape[0]):
        out[x] = key(row[x] ^ flip)


@njit_no_refcount
def larger(first, second, out):
    """Elementwise maximum of two rows."""
    for x in range(out.shape[0]):
        out[x] = max(first[x], second[x])


@njit_no_refcount
def larger_values(first, second, flip, out):
    """`values` of the elementwise maximum of two rows of keys."""
    for x in range(out.shape[0]):
        out[x] = key(max(first[x], second[x]) ^ flip)


@njit_no_refcount
def raise_to_four(a, b, c, d, out):
    """Raise `out` to the maximum of four rows."""
    for x in range(out.shape[0]):
        out[x] = max(max(max(a[x], b[x]), max(c[x], d[x])), out[x])


@njit_no_refcount
def raise_to_two(a, b, out):
    """Raise `out` to the maximum of two rows."""
    for x in range(out.shape[0]):
        out[x] = max(max(a[x], b[x]), out[x])


@njit_no_refcount
def largest_of_three(left, middle, right, out):
    """The maximum of three rows into `out`."""
    for x in range(out.shape[0]):
        out[x] = max(max(left[x], right[x]), middle[x])


@njit_no_refcount
def largest_and_highest(left, middle, right, highest, out):
    """The maximum of three rows into `out`; it raises `highest` too."""
    for x in range(out.shape[0]):
        value = max(max(left[x], right[x]), middle[x])
        out[x] = value
        highest[x] = max(highest[x], value)


@njit_no_refcount
def largest_of_six(left, middle, right, above, below, tallest, out):
    """Raise `tallest` to the maximum of `above` and `below`, and write its maximum with three rows
    into `out`.
    """
    for x in range(out.shape[0]):
        rows = max(max(above[x], below[x]), tallest[x])
        tallest[x] = rows
        out[x] = max(max(max(left[x], right[x]), middle[x]), rows)


@njit_no_refcount
def find_slots(y, height, slots, near):
    """Where the rows y - d and y + d lie in a ring of `slots` rows, into int64 [2, R + 1] `near`; a
    row past the picture is stood in for by the other one, or by row y.
    """
    own = y % slots
    for d in range(near.shape[1]):
        above, below = own - d, own + d
        above += slots if above < 0 else 0
        below -= slots if below >= slots else 0
        if y < d:
            above = below if y + d < height else own
        if y + d >= height:
            below = above
        near[0, d], near[1, d] = above, below


@njit_no_refcount
def widen_columns(lines, side, more, width):
    """Replace row `side` of the padded rows int32 [2, ..] `lines` by its maxima over 2 `more` + 1
    columns; returns the side where they lie.
    """
    pad = (lines.shape[1] - width) // 2
    done = 0
    while done < more:
        # A step one cell longer than what is covered leaves no gap, and none at a border.
        step = min(done + 1, more - done)
        done += step
        line, target = lines[side], lines[1 - side]
        largest_of_three(
            line[pad - step : pad - step + width],
            line[pad : pad + width],
            line[pad + step : pad + step + width],
            target[pad : pad + width],
        )
        side = 1 - side
    return side


@njit_no_refcount
def dilate_grey_square(image, radius, flip, blocks, lines, highest, out):
    """`dilate_grey` by a square, for a few maxima a pixel whatever the radius.

    Rows come in blocks of 2 R + 1 (van Herk; Gil and Werman): a window of rows is the end of one
    block and the beginning of the next. Scratch: int32 blocks [2, 2 R + 1, W], lines [2, W + 2 R]
    and highest [W].
    """
    height, width = image.shape
    size = blocks.shape[1]
    lines[0] = LOWEST
    lines[1] = LOWEST
    blocks[0] = LOWEST
    blocks[1] = LOWEST
    # What `widen_columns` would reach in all steps but the last, which writes to the block.
    covered = 0
    while 2 * covered + 1 < radius:
        covered = 2 * covered + 1
    rest = radius - covered
    now = 0
    for entering in range(height + radius):
        j = entering % size
        if j == 0:
            ends = blocks[now]  # from here on: maxima from each row to the last
            for n in range(size - 2, -1, -1):
                larger(ends[n], ends[n + 1], ends[n])
            now = 1 - now
            highest[:] = LOWEST
        row = blocks[now, j]
        if entering < height:
            keys(image[entering], flip, lines[0, radius : radius + width])
            line = lines[widen_columns(lines, 0, covered, width)]
            largest_and_highest(
                line[radius - rest : radius - rest + width],
                line[radius : radius + width],
                line[radius + rest : radius + rest + width],
                highest,
                row,
            )
        else:
            row[:] = LOWEST
        if entering >= radius:
            # The window of the last row of a block is that block.
            earlier = blocks[1 - now, j + 1] if j + 1 < size else highest
            larger_values(highest, earlier, flip, out[entering - radius])


@njit_no_refcount
def dilate_grey(image, stairs, flip, ring, lines, tallest, near, out):
    """Grey dilation (flip 0) or erosion (flip -1) of [H, W] `image` by the element `stairs`, a disk
    or a diamond; exact. NaN counts as 0.

    image and out are float32 values seen as int32: integers in the same order take the same
    maxima, and LLVM turns a float maximum that updates its own row into branches.
    Each rectangle of the element is a maximum over rows, then over columns. From the widest to the
    tallest, rows only join and columns only leave: one row of maxima over rows (`tallest`) serves
    all rectangles, and one of maxima over both is widened by what the next rectangle is narrower.
    `out` may be `image`: every row is read once, before it is written.
    Scratch: int32 ring [2 R + 1, W], the rows in reach, lines [2, W + 2 R] and tallest [W]; near
    int64 [2, R + 1].
    """
    height, width = image.shape
    slots, radius = ring.shape[0], near.shape[1] - 1
    lines[0] = LOWEST
    lines[1] = LOWEST
    side = ready = 0
    for y in range(height):
        while ready < min(height, y + radius + 1):
            keys(image[ready], flip, ring[ready % slots])
            ready += 1
        find_slots(y, height, slots, near)
        assign(ring[near[0, 0]], tallest)
        assign(tallest, lines[side, radius : radius + width])
        d = 1
        for n in range(1, stairs.shape[0]):
            tall = stairs[n, 0]
            # The last pair of rows joins in the pass that widens.
            while d + 1 < tall:
                up, down, up2, down2 = near[0, d], near[1, d], near[0, d + 1], near[1, d + 1]
                raise_to_four(ring[up], ring[down], ring[up2], ring[down2], tallest)
                d += 2
            if d < tall:
                raise_to_two(ring[near[0, d]], ring[near[1, d]], tallest)
                d += 1
            side = widen_columns(lines, side, stairs[n - 1, 1] - stairs[n, 1] - 1, width)
            line = lines[side]
            largest_of_six(
                line[radius - 1 : radius - 1 + width],
                line[radius : radius + width],
                line[radius + 1 : radius + 1 + width],
                ring[near[0, d]],
                ring[near[1, d]],
                tallest,
                lines[1 - side, radius : radius + width],
            )
            d += 1
            side = 1 - side
        values(lines[side, radius : radius + width], flip, out[y])
