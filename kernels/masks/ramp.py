"""Soft edges by distance: an exact Euclidean ramp on either side of a mask's edge.

The distance transform is kept to a band of R px around the edge (the two passes of Felzenszwalb
and Huttenlocher, "Distance Transforms of Sampled Functions", 2012: columns first, then a minimum
of parabolas along each row), in saturating 8 or 16 bit integers, so squared distances are exact
and a table gives the values.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit_no_refcount
from .bits import ALL, ONE, assign, unpack_bytes, valid_bits

SEGMENT = 64
# Cells of a full round of the vectorised loop over bytes; what is left over runs one by one.
ROUND = 128
FAR, AT, MIXED = 0, 1, 2


@njit_no_refcount
def step_down(bits, limit, state, out):
    """One row of the sweep down: 0 at a target (bit 0), else one more than above, at most limit."""
    small = state.dtype.type
    one = small(1)
    for x in range(state.shape[0]):
        mask = small(small(0) - small(bits[x]))
        near = small(min(small(state[x] + one), limit) & mask)
        state[x] = near
        out[x] = near


@njit_no_refcount
def step_up(state, out):
    """One row of the sweep up: the smaller of what is there and one more than below."""
    small = state.dtype.type
    one = small(1)
    for x in range(state.shape[0]):
        near = min(small(state[x] + one), out[x])
        state[x] = near
        out[x] = near


@njit_no_refcount
def column_distance(plane, g, radius, state):
    """Vertical distance, clipped to `radius`, to the nearest 0 of uint8 `plane` (values 0, 1).

    plane and the result `g` are [rows, W]; `g` and the scratch row `state` [W] are uint8 (radius
    <= 254) or uint16.
    """
    limit = g.dtype.type(radius)
    rows = plane.shape[0]
    state[:] = limit
    for y in range(rows):
        step_down(plane[y], limit, state, g[y])
    assign(g[rows - 1], state)
    for back in range(2, rows + 1):
        step_up(state, g[rows - back])


@njit_no_refcount
def square(distance, q):
    """Squares of `distance` into `q`, in its type."""
    small = q.dtype.type
    for x in range(distance.shape[0]):
        q[x] = small(distance[x] * distance[x])


@njit_no_refcount
def two_parabolas(left, right, left2, right2, step, step2, limit, limit2, acc):
    """Lower `acc` to the parabolas of the cells at two offsets on either side, saturating."""
    small = acc.dtype.type
    for x in range(acc.shape[0]):
        near = small(min(min(left[x], right[x]), limit) + step)
        near2 = small(min(min(left2[x], right2[x]), limit2) + step2)
        acc[x] = min(acc[x], min(near, near2))


@njit_no_refcount
def nearest_in_row(q, acc, x0, radius):
    """Squared distances acc [n] of columns x0..x0 + n: min over |j| < R of q[x + j] + j^2.

    q carries R cells on each side of the picture. Sums are cut at the largest value of the dtype;
    offsets up to R, which change nothing, make the number of offsets even.
    """
    small = q.dtype.type
    top = (1 << (8 * q.itemsize)) - 1
    n = acc.shape[0]
    at = radius + x0
    assign(q[at : at + n], acc)
    for j in range(1, radius, 2):
        k = j + 1
        two_parabolas(
            q[at - j : at - j + n],
            q[at + j : at + j + n],
            q[at - k : at - k + n],
            q[at + k : at + k + n],
            small(j * j),
            small(k * k),
            small(top - j * j),
            small(top - k * k),
            acc,
        )


@njit_no_refcount
def any_bits(words, flip):
    """OR of all words, each flipped by `flip` first."""
    found = np.uint64(0)
    for x in range(words.shape[0]):
        found |= words[x] ^ flip
    return found


@njit_no_refcount
def all_bits(words, flip):
    """AND of all words, each flipped by `flip` first."""
    found = ALL
    for x in range(words.shape[0]):
        found &= words[x] ^ flip
    return found


@njit_no_refcount
def survey(words, height, to_background, radius, k0, some, every):
    """Where targets lie, for whole segments of columns and 64 rows at a time.

    uint64 [K, ceil(W / SEGMENT)], for word rows k0.. of `words`: the rows with a target within
    `radius` columns of the segment, and those where every column of it is one.
    """
    width = words.shape[1]
    for k in range(some.shape[0]):
        word = words[k0 + k]
        flip = valid_bits(k0 + k, height) if to_background else np.uint64(0)
        for n in range(some.shape[1]):
            x0 = n * SEGMENT
            x1 = min(x0 + SEGMENT, width)
            some[k, n] = any_bits(word[max(0, x0 - radius) : min(width, x1 + radius)], flip)
            every[k, n] = all_bits(word[x0:x1], flip)


@njit_no_refcount
def classify(some, every, k0, y, a, b, kinds):
    """AT, FAR or MIXED for every segment of row y: targets only, none in rows a..b, or between."""
    for n in range(kinds.shape[0]):
        if (every[(y >> 6) - k0, n] >> np.uint64(y & 63)) & ONE:
            kinds[n] = AT
            continue
        found = np.uint64(0)
        for k in range(a >> 6, ((b - 1) >> 6) + 1):
            rows = some[k - k0, n]
            if k == a >> 6:
                rows &= ALL << np.uint64(a & 63)
            if k == (b - 1) >> 6:
                rows &= ALL >> np.uint64(63 - ((b - 1) & 63))
            found |= rows
        kinds[n] = MIXED if found else FAR


@njit_no_refcount
def look_up(acc, far, table, inside_only, out):
    """Table values of squared distances that are at most `far`; acc carries on to a whole word.

    Most cells lie on one side of the ramp or the other, so they are told apart a word at a time.
    """
    words = acc.view(np.uint64)
    each = 8 // acc.itemsize
    beyond = np.uint64(far) * (ALL // ((ONE << np.uint64(8 * acc.itemsize)) - ONE))
    n = out.shape[0]
    for i in range(-(-n // each)):
        x0, x1 = i * each, min((i + 1) * each, n)
        word = words[i]
        if word == np.uint64(0):
            if not inside_only:
                out[x0:x1] = table[0]
        elif word == beyond:
            out[x0:x1] = table[far]
        else:
            for x in range(x0, x1):
                if not inside_only or acc[x] > 0:
                    out[x] = table[acc[x]]


@njit_no_refcount
def ramp(
    words,
    height,
    y0,
    y1,
    radius,
    to_background,
    table,
    inside_only,
    plane,
    g,
    q,
    acc,
    kinds,
    some,
    every,
    row,
    out,
    oy,
    ox,
):
    """Rows y0..y1 of the picture, at (oy, ox) of float32 `out`: table[min(squared distance, R^2)]
    to the set (or clear) pixels.

    With `inside_only` pixels of distance 0 are left as they are. Scratch: `plane` uint8 and `g` of
    dtype T, both flat with (y1 - y0 + 2 R) W cells; q T [W + 2 R + ROUND], acc T [W + ROUND], kinds
    uint8 [S] with S = ceil(W / SEGMENT), some and every uint64 [K, S] for the word rows of rows y0
    - R to y1 + R, row uint8 [W]. T is uint8 up to R = 15, else uint16.
    """
    width = words.shape[1]
    far = g.dtype.type(radius * radius)
    a, b = max(0, y0 - radius), min(height, y1 + radius)
    bits = plane[: (b - a) * width].reshape((b - a, width))
    distance = g[: (b - a) * width].reshape((b - a, width))
    unpack_bytes(words, bits, not to_background, row, a, b)
    column_distance(bits, distance, radius, acc[:width])
    survey(words, height, to_background, radius, a >> 6, some, every)
    q[:radius] = far
    q[radius + width :] = far
    squares = q[radius : radius + width]
    for y in range(y0, y1):
        target = out[y + oy, ox : ox + width]
        square(distance[y - a], squares)
        classify(some, every, a >> 6, y, max(a, y - radius), min(b, y + radius + 1), kinds)
        n = 0
        while n < kinds.shape[0]:
            first, kind = n, kinds[n]
            while n < kinds.shape[0] and kinds[n] == kind:
                n += 1
            x0, x1 = first * SEGMENT, min(n * SEGMENT, width)
            cells = target[x0:x1]
            if kind == FAR:
                cells[:] = table[far]
            elif kind == MIXED:
                nearest = acc[: -(-(x1 - x0) // ROUND) * ROUND]
                nearest_in_row(q, nearest, x0, radius)
                look_up(nearest, far, table, inside_only, cells)
            elif not inside_only:
                cells[:] = table[0]
