"""Soft edges by distance: an exact Euclidean ramp on either side of a mask's edge.

The distance transform is kept to a band of R px around the edge (the two passes of Felzenszwalb
and Huttenlocher, "Distance Transforms of Sampled Functions", 2012: columns first, then a minimum
of parabolas along each row), in saturating 8 or 16 bit integers, so squared distances are exact
and a table gives the values.
"""

from __future__ import annotations

from ._jit import leaf
from .bits import assign, unpack_bytes

SEGMENT = 64
FAR, AT, MIXED = 0, 1, 2


@leaf
def step_down(bits, limit, state, out):
    """One row of the sweep down: 0 at a target (bit 0), else one more than above, at most limit."""
    small = state.dtype.type
    one = small(1)
    for x in range(state.shape[0]):
        mask = small(small(0) - small(bits[x]))
        near = small(min(small(state[x] + one), limit) & mask)
        state[x] = near
        out[x] = near


@leaf
def step_up(state, out):
    """One row of the sweep up: the smaller of what is there and one more than below."""
    small = state.dtype.type
    one = small(1)
    for x in range(state.shape[0]):
        near = min(small(state[x] + one), out[x])
        state[x] = near
        out[x] = near


@leaf
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


@leaf
def square(distance, q):
    small = q.dtype.type
    for x in range(distance.shape[0]):
        q[x] = small(distance[x] * distance[x])


@leaf
def smallest(row):
    least = row[0]
    for x in range(row.shape[0]):
        least = min(least, row[x])
    return least


@leaf
def largest(row):
    most = row[0]
    for x in range(row.shape[0]):
        most = max(most, row[x])
    return most


@leaf
def two_parabolas(left, right, left2, right2, step, step2, limit, limit2, acc):
    """Lower `acc` to the parabolas of the cells at two offsets on either side, saturating."""
    small = acc.dtype.type
    for x in range(acc.shape[0]):
        near = small(min(min(left[x], right[x]), limit) + step)
        near2 = small(min(min(left2[x], right2[x]), limit2) + step2)
        acc[x] = min(acc[x], min(near, near2))


@leaf
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


@leaf
def classify(q, far, radius, kinds):
    """FAR, AT or MIXED for every segment of a row: no target in reach, targets only, or between."""
    width = q.shape[0] - 2 * radius
    for n in range(kinds.shape[0]):
        x0 = n * SEGMENT
        x1 = min(x0 + SEGMENT, width)
        if smallest(q[x0 : x1 + 2 * radius]) == far:
            kinds[n] = FAR
        elif largest(q[radius + x0 : radius + x1]) == 0:
            kinds[n] = AT
        else:
            kinds[n] = MIXED


@leaf
def look_up(acc, far, table, inside_only, out):
    if inside_only:
        for x in range(out.shape[0]):
            if acc[x] > 0:
                out[x] = table[min(acc[x], far)]
    else:
        for x in range(out.shape[0]):
            out[x] = table[min(acc[x], far)]


@leaf
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
    row,
    out,
    oy,
    ox,
):
    """Rows y0..y1 of the picture, at (oy, ox) of float32 `out`: table[min(squared distance, R^2)]
    to the set (or clear) pixels.

    With `inside_only` pixels of distance 0 are left as they are. Scratch: `plane` uint8 and `g` of
    dtype T, both flat with (y1 - y0 + 2 R) W cells; q T [W + 2 R], acc T [W], kinds uint8 [ceil(W /
    SEGMENT)], row uint8 [W]. T is uint8 up to R = 15, else uint16.
    """
    width = words.shape[1]
    far = g.dtype.type(radius * radius)
    a, b = max(0, y0 - radius), min(height, y1 + radius)
    bits = plane[: (b - a) * width].reshape((b - a, width))
    distance = g[: (b - a) * width].reshape((b - a, width))
    unpack_bytes(words, bits, not to_background, row, a, b)
    column_distance(bits, distance, radius, acc)
    q[:radius] = far
    q[radius + width :] = far
    squares = q[radius : radius + width]
    for y in range(y0, y1):
        target = out[y + oy, ox : ox + width]
        square(distance[y - a], squares)
        classify(q, far, radius, kinds)
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
                nearest_in_row(q, acc[x0:x1], x0, radius)
                look_up(acc[x0:x1], far, table, inside_only, cells)
            elif not inside_only:
                cells[:] = table[0]
