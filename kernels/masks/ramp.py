"""Soft edges by distance: an exact Euclidean ramp on either side of a mask's edge.

The distance transform is kept to a band of R px around the edge (the two passes of Felzenszwalb
and Huttenlocher, "Distance Transforms of Sampled Functions", 2012: columns first, then a minimum
of parabolas along each row), in saturating 8 or 16 bit integers, so squared distances are exact
and a table gives the values.
"""

from __future__ import annotations

from ._jit import njit
from .bits import unpack_bytes

SEGMENT = 64


@njit
def column_distance(plane, g, radius):
    """Vertical distance, clipped to `radius`, to the nearest 0 of uint8 `plane` (values 0, 1),
    into `g`.

    Both are [rows, W]; `g` is uint8 (radius <= 254) or uint16.
    """
    small = g.dtype.type
    one, limit = small(1), small(radius)
    rows, width = plane.shape
    for y in range(rows):
        bits, now = plane[y], g[y]
        if y == 0:
            for x in range(width):
                now[x] = small(limit & small(small(0) - small(bits[x])))
        else:
            above = g[y - 1]
            for x in range(width):
                now[x] = small(min(small(above[x] + one), limit) & small(small(0) - small(bits[x])))
    for y in range(rows - 2, -1, -1):
        below, now = g[y + 1], g[y]
        for x in range(width):
            now[x] = min(now[x], small(below[x] + one))


@njit
def row_minimum(q, acc, x0, x1, radius):
    """Squared distances acc[x0:x1]: min over |j| < R of q[x + j] + j^2, saturating; q carries R
    cells each side.
    """
    small = q.dtype.type
    top = (1 << (8 * q.itemsize)) - 1
    target, centre = acc[x0:x1], q[radius + x0 : radius + x1]
    for x in range(target.shape[0]):
        target[x] = centre[x]
    for j in range(1, radius):
        step, limit = small(j * j), small(top - j * j)
        left = q[radius + x0 - j : radius + x1 - j]
        right = q[radius + x0 + j : radius + x1 + j]
        for x in range(target.shape[0]):
            near = min(min(left[x], right[x]), limit)
            target[x] = min(target[x], small(near + step))


@njit
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
    row,
    out,
    oy,
    ox,
):
    """Rows y0..y1 of the picture, at (oy, ox) of float32 `out`: table[min(squared distance, R^2)]
    to the set (or clear) pixels.

    With `inside_only` pixels of distance 0 are left as they are. Scratch: `plane` uint8 and `g` of
    dtype T, both flat with (y1 - y0 + 2 R) W cells; q T [W + 2 R], acc T [W], row uint8 [W]. T is
    uint8 up to R = 15, else uint16.
    """
    width = words.shape[1]
    small = g.dtype.type
    far = small(radius * radius)
    a, b = max(0, y0 - radius), min(height, y1 + radius)
    bits = plane[: (b - a) * width].reshape((b - a, width))
    distance = g[: (b - a) * width].reshape((b - a, width))
    if to_background:
        unpack_bytes(words, bits, 0, 1, row, a, b)
    else:
        unpack_bytes(words, bits, 1, 0, row, a, b)
    column_distance(bits, distance, radius)
    for x in range(radius):
        q[x] = far
        q[radius + width + x] = far
    for y in range(y0, y1):
        now, target = distance[y - a], out[y + oy, ox : ox + width]
        square = q[radius : radius + width]
        for x in range(width):
            square[x] = small(now[x] * now[x])
        x0 = 0
        while x0 < width:
            x1 = min(x0 + SEGMENT, width)
            window, segment = q[x0 : x1 + 2 * radius], square[x0:x1]
            nearest, farthest = far, small(0)
            for x in range(window.shape[0]):
                nearest = min(nearest, window[x])
            for x in range(segment.shape[0]):
                farthest = max(farthest, segment[x])
            cells, found = target[x0:x1], acc[x0:x1]
            if nearest == far:
                for x in range(cells.shape[0]):
                    cells[x] = table[far]
            elif farthest == small(0):
                if not inside_only:
                    for x in range(cells.shape[0]):
                        cells[x] = table[0]
            else:
                row_minimum(q, acc, x0, x1, radius)
                if inside_only:
                    for x in range(cells.shape[0]):
                        if found[x] > small(0):
                            cells[x] = table[min(found[x], far)]
                else:
                    for x in range(cells.shape[0]):
                        cells[x] = table[min(found[x], far)]
            x0 = x1
