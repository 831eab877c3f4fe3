"""Convex hulls of regions, from the column extents of their vertical runs.

A column of a hull depends on the topmost and lowest pixel of each column alone, so the hull of a
region is two monotone chains (Andrew 1979) over its columns. Corners are pixel centres and the
arithmetic is in integers: a pixel belongs to the hull where its centre lies in the polygon or on
its edge. A hull "with outline" has the pixels nearest to its edges too, one for each step along an
edge's longer axis: a polygon as drawing libraries paint it.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit, njit_no_refcount
from .bits import ALL, ONE, trailing_zeros
from .components import connected_runs

NONE = np.int32(2**31 - 1)


@njit_no_refcount
def set_range(words, x, y0, y1):
    """Set rows y0..y1 of column x."""
    k0, k1 = y0 >> 6, (y1 - 1) >> 6
    for k in range(k0, k1 + 1):
        bits = ALL
        if k == k0:
            bits &= ALL << np.uint64(y0 & 63)
        if k == k1:
            bits &= ALL >> np.uint64(63 - ((y1 - 1) & 63))
        words[k, x] |= bits


@njit_no_refcount
def chain(edge, sign, stack):
    """Corners of the hull of the points (x, edge[x]), columns without a point (NONE) left out.

    sign 1: the side of small values; -1: of large ones. Returns how many columns of `stack` hold
    corners, from left to right.
    """
    size = 0
    for x in range(edge.shape[0]):
        if edge[x] == NONE:
            continue
        while size >= 2:
            a, b = stack[size - 2], stack[size - 1]
            turn = (np.int64(b) - a) * (np.int64(edge[x]) - edge[a])
            turn -= (np.int64(edge[b]) - edge[a]) * (np.int64(x) - a)
            if sign * turn > 0:
                break
            size -= 1
        stack[size] = x
        size += 1
    return size


@njit_no_refcount
def stretch(edge, sign, stack, size):
    """Replace edge[x] between corners by the hull's edge, rounded into the hull."""
    for n in range(size - 1):
        a, b = np.int64(stack[n]), np.int64(stack[n + 1])
        start, rise, run = np.int64(edge[a]), np.int64(edge[b]) - edge[a], b - a
        for x in range(a + 1, b):
            step = rise * (x - a)
            edge[x] = start - (-step) // run if sign > 0 else start + step // run


@njit_no_refcount
def outline(edge, first, stack, size, out):
    """Set the pixels nearest to the edges between corners; columns of `edge` start at `first`."""
    for n in range(size - 1):
        a, b = np.int64(stack[n]), np.int64(stack[n + 1])
        run, rise = b - a, np.int64(edge[b]) - edge[a]
        steps = max(run, abs(rise))
        for i in range(1, steps):
            x = first + a + (2 * run * i + steps) // (2 * steps)
            y = edge[a] + (2 * rise * i + steps) // (2 * steps)
            out[y >> 6, x] |= ONE << np.uint64(y & 63)


@njit_no_refcount
def fill_hull(top, bottom, first, stack, outlined, out):
    """Set the hull of a region in `out`, with outline or without; its columns start at column
    `first`.

    top, bottom: int32 [n], first and last row of each column, NONE in both where it has no pixel;
    overwritten. stack: int32 [n] scratch.
    """
    for edge, sign in ((top, 1), (bottom, -1)):
        size = chain(edge, sign, stack)
        if outlined:
            outline(edge, first, stack, size, out)
        stretch(edge, sign, stack, size)
    for x in range(top.shape[0]):
        if top[x] != NONE and top[x] <= bottom[x]:
            set_range(out, first + x, top[x], bottom[x] + 1)


@njit_no_refcount
def extents(words, top, bottom):
    """First and last set row of every column into int32 [W] `top` and `bottom`; NONE where none."""
    top[:] = NONE
    bottom[:] = NONE
    for k in range(words.shape[0]):
        for x in range(words.shape[1]):
            left = words[k, x]
            if left != np.uint64(0):
                if top[x] == NONE:
                    top[x] = 64 * k + np.int64(trailing_zeros(left))
                last = 63
                while (left >> np.uint64(last)) & ONE == np.uint64(0):
                    last -= 1
                bottom[x] = 64 * k + last


@njit
def hull_of_all(words, out):
    """OR the convex hull of all set pixels of uint64 [K, W] `words` into `out`."""
    width = words.shape[1]
    top, bottom = np.empty(width, np.int32), np.empty(width, np.int32)
    extents(words, top, bottom)
    fill_hull(top, bottom, 0, np.empty(width, np.int32), False, out)


@njit
def hulls(words, height, outlined, out):
    """OR the convex hull of every 8-connected region of uint64 [K, W] `words` into `out`, with
    outline or without.
    """
    end, column, parent = connected_runs(words, height)
    runs, width = parent.shape[0], words.shape[1]
    # A root is its region's first run, so regions are met in the order of their first columns.
    first, last = np.empty(runs, np.int32), np.empty(runs, np.int32)
    for i in range(runs):
        parent[i] = parent[parent[i]]
    for x in range(width):
        shade = words[0, x] & ONE
        for i in range(column[x], column[x + 1]):
            if shade:
                if parent[i] == i:
                    first[i] = x
                last[parent[i]] = x
            shade ^= ONE
    place = np.empty(runs, np.int32)
    cells = 0
    for x in range(width):
        shade = words[0, x] & ONE
        for i in range(column[x], column[x + 1]):
            if shade and parent[i] == i:
                place[i] = cells
                cells += last[i] - first[i] + 1
            shade ^= ONE
    top, bottom = np.full(cells, NONE, np.int32), np.full(cells, NONE, np.int32)
    for x in range(width):
        shade = words[0, x] & ONE
        above = 0
        for i in range(column[x], column[x + 1]):
            if shade:
                root = parent[i]
                at = place[root] + x - first[root]
                top[at] = min(top[at], above)
                bottom[at] = end[i] - 1
            shade ^= ONE
            above = end[i]
    stack = np.empty(width, np.int32)
    for x in range(width):
        shade = words[0, x] & ONE
        for i in range(column[x], column[x + 1]):
            if shade and parent[i] == i:
                a, b = place[i], place[i] + last[i] - first[i] + 1
                fill_hull(top[a:b], bottom[a:b], first[i], stack, outlined, out)
            shade ^= ONE
