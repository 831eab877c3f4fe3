"""Holes and islands by connected components of vertical runs (union-find over run indices).

Foreground is 8-connected and background 4-connected, the usual dual pair: two regions never cross.
One union-find holds both colours, so that filling and dropping need one walk over the picture.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit, njit_no_refcount
from .bits import ALL, ONE, popcount, trailing_zeros, valid_bits


@njit_no_refcount
def find(parent, i):
    """Root of run i; halves the path on the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit_no_refcount
def unite(parent, i, j):
    """Join the trees of runs i and j; the smaller index stays root, so a root is its component's
    first run.
    """
    i, j = find(parent, i), find(parent, j)
    if i < j:
        parent[j] = i
    elif j < i:
        parent[i] = j


@njit_no_refcount
def transitions(words, k, x, height):
    """Bits set at the rows of word row k where the colour differs from the row above; row 0 never
    counts.
    """
    word = words[k, x]
    carry = word & ONE if k == 0 else words[k - 1, x] >> np.uint64(63)
    return (word ^ ((word << ONE) | carry)) & valid_bits(k, height)


@njit_no_refcount
def count_runs(words, height):
    """Number of vertical runs of both colours in all columns."""
    count, width = words.shape
    total = np.int64(width)
    for k in range(count):
        for x in range(width):
            total += np.int64(popcount(transitions(words, k, x, height)))
    return total


@njit_no_refcount
def find_runs(words, height, end, column):
    """Run ends (exclusive rows) into int32 `end`, the index of each column's first run into int32
    [W + 1] `column`.
    """
    count, width = words.shape
    run = 0
    for x in range(width):
        column[x] = run
        for k in range(count):
            left = transitions(words, k, x, height)
            while left != np.uint64(0):
                end[run] = 64 * k + np.int64(trailing_zeros(left))
                run += 1
                left &= left - ONE
        end[run] = height
        run += 1
    column[width] = run


@njit_no_refcount
def connect(words, height, end, column, parent):
    """Join the runs of neighbouring columns: equal colours that share a row, and foreground that
    meets at a corner.
    """
    for i in range(parent.shape[0]):
        parent[i] = i
    for x in range(1, words.shape[1]):
        i, j = column[x - 1], column[x]
        left, right = words[0, x - 1] & ONE, words[0, x] & ONE
        while True:
            if left == right:
                unite(parent, i, j)
            below_i, below_j = end[i], end[j]
            if below_i == below_j:
                if below_i == height:
                    break
                if left != right:
                    if left:
                        unite(parent, i, j + 1)
                    else:
                        unite(parent, i + 1, j)
                i += 1
                j += 1
                left ^= ONE
                right ^= ONE
            elif below_i < below_j:
                i += 1
                left ^= ONE
            else:
                j += 1
                right ^= ONE


@njit_no_refcount
def measure(end, column, parent, area):
    """Pixels of each component at its root's place in int32 `area`; flattens `parent` to roots."""
    for i in range(parent.shape[0]):
        parent[i] = parent[parent[i]]
        area[i] = 0
    for x in range(column.shape[0] - 1):
        above = 0
        for i in range(column[x], column[x + 1]):
            area[parent[i]] += end[i] - above
            above = end[i]


@njit_no_refcount
def mark_holes(column, colour, parent, area, border, max_hole):
    """Turn enclosed background of at most `max_hole` px (negative: any size) to foreground.

    Joining each of its runs with the run above is enough: above the top of a hole lies what
    surrounds it, and above some run of the hole lies the bottom of every island inside.
    """
    width = column.shape[0] - 1
    for x in range(width):
        first, last = column[x], column[x + 1] - 1
        if x in (0, width - 1):
            for i in range(first, last + 1):
                border[parent[i]] = 1
        else:
            border[parent[first]] = 1
            border[parent[last]] = 1
    filled = 0
    for i in range(parent.shape[0]):
        root = parent[i]
        if colour[i] == 0 and border[root] == 0 and (max_hole < 0 or area[root] <= max_hole):
            colour[i] = 2
            filled += 1
    if filled:
        for i in range(parent.shape[0]):
            if colour[i] == 2:
                colour[i] = 1
                unite(parent, i, i - 1)
    return filled


@njit_no_refcount
def drop_islands(colour, parent, area, min_island, keep):
    """Clear components below `min_island` px, then all but the `keep` largest (0: all stay).

    Among equal areas the component whose first pixel comes first, column by column, is kept.
    """
    runs = parent.shape[0]
    if keep > 0:
        for _ in range(keep):
            best, best_area = -1, min_island - 1
            for i in range(runs):
                if parent[i] == i and colour[i] == 1 and area[i] > best_area:
                    best, best_area = i, area[i]
            if best < 0:
                break
            area[best] = -area[best]
        for i in range(runs):
            if colour[i] == 1 and area[parent[i]] >= 0:
                colour[i] = 0
    else:
        for i in range(runs):
            if colour[i] == 1 and area[parent[i]] < min_island:
                colour[i] = 0


@njit_no_refcount
def flip_range(words, x, y0, y1):
    """Flip rows y0..y1 of column x."""
    k0, k1 = y0 >> 6, (y1 - 1) >> 6
    for k in range(k0, k1 + 1):
        flip = ALL
        if k == k0:
            flip &= ALL << np.uint64(y0 & 63)
        if k == k1:
            flip &= ALL >> np.uint64(63 - ((y1 - 1) & 63))
        words[k, x] ^= flip


@njit
def connected_runs(words, height):
    """(end, column, parent) of all runs of uint64 [K, W] `words`, new int32 arrays: see `find_runs`
    and `connect`.
    """
    runs = count_runs(words, height)
    end, parent = np.empty(runs, np.int32), np.empty(runs, np.int32)
    column = np.empty(words.shape[1] + 1, np.int32)
    find_runs(words, height, end, column)
    connect(words, height, end, column, parent)
    return end, column, parent


@njit
def count_regions(words, height):
    """Number of 8-connected regions of set pixels in uint64 [K, W] `words`."""
    _, column, parent = connected_runs(words, height)
    regions = 0
    for x in range(words.shape[1]):
        shade = np.int64(words[0, x] & ONE)
        for i in range(column[x], column[x + 1]):
            regions += shade & np.int64(parent[i] == i)
            shade ^= 1
    return regions


@njit
def box(words, height, share):
    """(x, y, width, height) around the 8-connected regions of uint64 [K, W] `words` that have at
    least 1 / `share` of the largest one's pixels; all 0 without any.
    """
    end, column, parent = connected_runs(words, height)
    area = np.empty(parent.shape[0], np.int32)
    measure(end, column, parent, area)
    width, largest = words.shape[1], 0
    for x in range(width):
        shade = words[0, x] & ONE
        for i in range(column[x], column[x + 1]):
            if shade and area[parent[i]] > largest:
                largest = area[parent[i]]
            shade ^= ONE
    left, right, top, bottom = width, -1, height, 0
    for x in range(width):
        shade, above = words[0, x] & ONE, 0
        for i in range(column[x], column[x + 1]):
            if shade and np.int64(area[parent[i]]) * share >= largest:
                left, right = min(left, x), x
                top, bottom = min(top, above), max(bottom, np.int64(end[i]))
            shade ^= ONE
            above = np.int64(end[i])
    if right < 0:
        return 0, 0, 0, 0
    return left, top, right - left + 1, bottom - top


@njit
def clean(words, height, max_hole, min_island, keep):
    """Fill holes and drop islands of uint64 [K, W] `words`, in place.

    max_hole: largest area (px) of a background region to fill, 0 = off, negative = any; regions at
    the picture border are never holes, and an island inside a hole does not count to its area.
    min_island: components below this many px vanish (0 or 1 = off). keep: number of largest
    components that stay (0 = all). Holes first, then islands.
    """
    end, column, parent = connected_runs(words, height)
    runs, width = parent.shape[0], words.shape[1]
    area = np.empty(runs, np.int32)
    colour = np.empty(runs, np.uint8)
    for x in range(width):
        shade = np.uint8(words[0, x] & ONE)
        for i in range(column[x], column[x + 1]):
            colour[i] = shade
            shade = np.uint8(shade ^ 1)
    measure(end, column, parent, area)
    if max_hole != 0:
        filled = mark_holes(column, colour, parent, area, np.zeros(runs, np.uint8), max_hole)
        if filled and (min_island > 1 or keep > 0):
            measure(end, column, parent, area)
    if min_island > 1 or keep > 0:
        drop_islands(colour, parent, area, min_island, keep)
    for x in range(width):
        shade = np.uint8(words[0, x] & ONE)
        above = 0
        for i in range(column[x], column[x + 1]):
            if colour[i] != shade:
                flip_range(words, x, above, end[i])
            shade = np.uint8(shade ^ 1)
            above = end[i]
