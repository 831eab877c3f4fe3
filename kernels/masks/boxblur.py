"""Gaussian feather: three box filters in exact integers, from bit planes.

Kovesi, "Fast Almost-Gaussian Filtering", 2010: three boxes of two odd widths have the standard
deviation asked for to within a fraction of a pixel. Each pass repeats the edge values, on both
axes, exactly like three calls of `scipy.ndimage.uniform_filter(mode="nearest")`; sums are exact,
so there is no drift, no rounding before the end, and the two axes may come in either order. Rows
come first: a row of 0 and 1 is a sum of steps, and three boxes turn a step into one fixed curve,
so that a row costs as much as it has edges. Columns follow as running sums that keep only the rows
in reach: a picture of any height then works in the cache, and in little memory.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit_no_refcount
from .bits import ONE, assign, trailing_zeros

# Above this many cells added for each cell of a row, sums along the row are cheaper than curves.
DENSE = 32


def exact_dtypes(widths: tuple[int, int, int]) -> tuple[type, type]:
    """Smallest dtypes in which the sums of three boxes, and of six, stay exact.

    The wider one is signed: unsigned numbers take several times as long to turn into floats.
    """
    product = widths[0] * widths[1] * widths[2]
    return (np.uint16, np.int32) if product**2 < 2**31 else (np.uint32, np.int64)


def unit_scale(widths: tuple[int, int, int]) -> np.float32:
    """Factor that turns the full sum into 1; one step up, so that a full window reaches 1 before
    it is cut there.
    """
    full = float(widths[0] * widths[1] * widths[2]) ** 2
    return np.nextafter(np.float32(1 / full), np.float32(1))


def step_curve(widths: tuple[int, int, int]) -> np.ndarray:
    """What three boxes make of a step from 0 to 1: their sums at the sum(w // 2) cells before it
    and as many from it on; 0 before those, the product of the widths after.
    """
    kernel = np.ones(1, np.int64)
    for width in widths:
        kernel = np.convolve(kernel, np.ones(width, np.int64))
    return np.cumsum(kernel)[:-1].astype(exact_dtypes(widths)[0])


def ring_rows(radius: int) -> int:
    """Rows to keep for a box of half width `radius`: a power of two, so that a slot costs no
    division.
    """
    return 1 << (2 * radius + 1).bit_length()


@njit_no_refcount
def find_edges(word, edges, count):
    """Columns where a pixel differs from the one before, row by row, from one word row: int32 [64,
    W] `edges`, of which each row holds the first `count` [64].
    """
    count[:] = 0
    for x in range(1, word.shape[0]):
        left = word[x] ^ word[x - 1]
        while left != np.uint64(0):
            j = np.int64(trailing_zeros(left))
            edges[j, count[j]] = x
            count[j] += 1
            left &= left - ONE


@njit_no_refcount
def fill(value, out):
    """Write one value everywhere."""
    for x in range(out.shape[0]):
        out[x] = value


@njit_no_refcount
def add_curve(curve, out):
    """Add a row to `out`, in its own type."""
    small = out.dtype.type
    for x in range(out.shape[0]):
        out[x] = small(out[x] + curve[x])


@njit_no_refcount
def take_curve(curve, out):
    """Subtract a row from `out`, in its own type."""
    small = out.dtype.type
    for x in range(out.shape[0]):
        out[x] = small(out[x] - curve[x])


@njit_no_refcount
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


@njit_no_refcount
def draw(edges, value, x0, values):
    """Cells x0.. of the 0/1 row that begins with `value` and changes at `edges`, into `values`."""
    one = values.dtype.type(1)
    x1 = x0 + values.shape[0]
    at = x0
    for n in range(edges.shape[0] + 1):
        end = min(x1, np.int64(edges[n])) if n < edges.shape[0] else x1
        if end > at:
            fill(value, values[at - x0 : end - x0])
            at = end
        value = values.dtype.type(one - value)


@njit_no_refcount
def box_part(edges, value, x0, radii, total, values):
    """Cells x0.. of that row under the three boxes, repeating the end values before each."""
    draw(edges, value, x0, values)
    box_row(values, total, radii[0])
    box_row(values, total, radii[1])
    box_row(values, total, radii[2])


@njit_no_refcount
def add_steps(edges, value, reach, curve, area, out):
    """A symmetric kernel, in `out` [W], along the 0/1 row that begins with `value` and changes at
    `edges`: exact from `reach` cells inside either end on.

    curve [2 reach]: the kernel's sums over a step at the `reach` cells before it and as many from
    it on; area: its sum over ones.
    """
    width = out.shape[0]
    inside = value != 0
    done = 0
    for n in range(edges.shape[0]):
        first = edges[n] - reach
        a, b = max(0, first), min(width, edges[n] + reach)
        if b > done:
            fill(area if inside else out.dtype.type(0), out[done:b])
            done = b
        if inside:
            take_curve(curve[a - first : b - first], out[a:b])
        else:
            add_curve(curve[a - first : b - first], out[a:b])
        inside = not inside
    fill(area if inside else out.dtype.type(0), out[done:])


@njit_no_refcount
def box_edges(edges, value, radii, curve, strip, total, out):
    """Three box sums, in `out` [W], along the 0/1 row that begins with `value` and changes at
    `edges` [n].

    Steps nearer to an end of the row than the boxes reach meet the repeated end values, which is
    not what a step far inside does; those ends are done box by box. Scratch: strip [2 sum(radii)],
    total [W + 2 max(radii) + 1].
    """
    small = out.dtype.type
    width, reach = out.shape[0], radii[0] + radii[1] + radii[2]
    count = edges.shape[0]
    at_start = count > 0 and edges[0] < reach
    at_end = count > 0 and edges[count - 1] > width - reach
    narrow = (at_start or at_end) and width <= 2 * reach
    if narrow or 2 * reach * count > DENSE * width:
        box_part(edges, value, 0, radii, total, out)
        return
    area = small((2 * radii[0] + 1) * (2 * radii[1] + 1) * (2 * radii[2] + 1))
    add_steps(edges, value, reach, curve, area, out)
    if at_start:
        box_part(edges, value, 0, radii, total, strip)
        assign(strip[:reach], out[:reach])
    if at_end:
        box_part(edges, value, width - 2 * reach, radii, total, strip)
        assign(strip[reach:], out[width - reach :])


@njit_no_refcount
def add_row(total, entering):
    """Add a row to the running sums `total`, in their type."""
    wide = total.dtype.type
    for x in range(total.shape[0]):
        total[x] = wide(total[x] + wide(entering[x]))


@njit_no_refcount
def slide_row(before, entering, leaving, now):
    """Running sums one row on: `before` plus the row that enters, minus the one that leaves."""
    wide = now.dtype.type
    for x in range(now.shape[0]):
        now[x] = wide(before[x] + wide(wide(entering[x]) - wide(leaving[x])))


@njit_no_refcount
def next_sum(ring, x0, y, first, r, height, before, now):
    """Vertical box sum of row y into `now` from the columns from x0 on of the rows of `ring`, where
    row n lies in slot n modulo its length, a power of two; `before` is the sum of row y - 1, unless
    y is the `first` one.

    Past the picture its first and last rows repeat.
    """
    last, x1 = ring.shape[0] - 1, x0 + now.shape[0]
    if y == first:
        fill(now.dtype.type(0), now)
        for n in range(y - r, y + r + 1):
            add_row(now, ring[min(max(n, 0), height - 1) & last, x0:x1])
    else:
        entering, leaving = min(y + r, height - 1) & last, max(y - r - 1, 0) & last
        slide_row(before, ring[entering, x0:x1], ring[leaving, x0:x1], now)


@njit_no_refcount
def to_float(values, scale, out):
    """Values times `scale`, at most 1."""
    one = np.float32(1)
    for x in range(out.shape[0]):
        out[x] = min(np.float32(np.float32(values[x]) * scale), one)


@njit_no_refcount
def slide_all(
    entering, leaving, once, once_leaving, now, twice, twice_leaving, next_, sums, scale, out
):
    """`slide_row` for all three boxes and `to_float` in one pass, for as long as every row out
    brings one row in: `once` and `twice` go from the row before to `now` and `next_`, `sums` stays
    in place.
    """
    wide = sums.dtype.type
    one = np.float32(1)
    for x in range(out.shape[0]):
        a = wide(once[x] + wide(wide(entering[x]) - wide(leaving[x])))
        now[x] = a
        b = wide(twice[x] + wide(a - once_leaving[x]))
        next_[x] = b
        c = wide(sums[x] + wide(b - twice_leaving[x]))
        sums[x] = c
        out[x] = min(np.float32(np.float32(c) * scale), one)


@njit_no_refcount
def triple_box(
    words,
    height,
    y0,
    y1,
    x0,
    radii,
    curve,
    scale,
    edges,
    count,
    strip,
    total,
    rows,
    once,
    twice,
    sums,
    spare,
    out,
    oy,
    ox,
):
    """Rows y0..y1 and columns x0.. of the 0/1 picture `words` under three box filters of half
    widths `radii`: float32 `out`, from (oy + y0, ox) on, as many columns as `sums` has.

    curve, scale: `step_curve`, `unit_scale`. Scratch in the dtypes N, M of `exact_dtypes`, with n
    columns to compute: edges int32 [64, W]; count int64 [64]; strip N [2 sum(radii)]; total N [W +
    2 max(radii) + 1]; rows N [.., W], once M [.., n] and twice M [.., n], as many as `ring_rows` of
    the three radii; sums and spare M [n].
    """
    ra, rb, rc = radii
    n = sums.shape[0]
    b0 = max(0, y0 - rc)
    a0 = max(0, b0 - rb)
    at = max(0, a0 - ra)
    rows_last, once_last, twice_last = rows.shape[0] - 1, once.shape[0] - 1, twice.shape[0] - 1
    known = -1
    n1, n2 = a0, b0
    for y in range(y0, y1):
        in_step = y > y0 and y + ra + rb + rc < height
        while n2 <= min(y + rc, height - 1):
            while n1 <= min(n2 + rb, height - 1):
                while at <= min(n1 + ra, height - 1):
                    if known != at >> 6:
                        known = at >> 6
                        find_edges(words[known], edges, count)
                    row = rows[at & rows_last]
                    first = row.dtype.type((words[known, 0] >> np.uint64(at & 63)) & ONE)
                    found = edges[at & 63, : count[at & 63]]
                    box_edges(found, first, radii, curve, strip, total, row)
                    at += 1
                if not in_step:
                    before = once[max(n1 - 1, 0) & once_last]
                    next_sum(rows, x0, n1, a0, ra, height, before, once[n1 & once_last])
                n1 += 1
            if not in_step:
                before = twice[max(n2 - 1, 0) & twice_last]
                next_sum(once, 0, n2, b0, rb, height, before, twice[n2 & twice_last])
            n2 += 1
        target = out[y + oy, ox : ox + n]
        if in_step:
            m1, m2 = n1 - 1, n2 - 1
            slide_all(
                rows[(m1 + ra) & rows_last, x0 : x0 + n],
                rows[max(m1 - ra - 1, 0) & rows_last, x0 : x0 + n],
                once[(m1 - 1) & once_last],
                once[max(m2 - rb - 1, 0) & once_last],
                once[m1 & once_last],
                twice[(m2 - 1) & twice_last],
                twice[max(y - rc - 1, 0) & twice_last],
                twice[m2 & twice_last],
                sums,
                scale,
                target,
            )
        else:
            assign(sums, spare)
            next_sum(twice, 0, y, y0, rc, height, spare, sums)
            to_float(sums, scale, target)


@njit_no_refcount
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


@njit_no_refcount
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
