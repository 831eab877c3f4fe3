"""Gaussian feather: three box filters in exact integers, from bit planes.

Kovesi, "Fast Almost-Gaussian Filtering", 2010: three boxes of two odd widths have the standard
deviation asked for to within a fraction of a pixel. Each pass repeats the edge values, on both
axes, exactly like three calls of `scipy.ndimage.uniform_filter(mode="nearest")`; sums are exact,
so there is no drift and no rounding before the end. Columns come first, as running sums that keep
only the rows in reach: a picture of any height then works in the cache, and in little memory.
"""

from __future__ import annotations

import numpy as np

from ._jit import leaf
from .bits import BYTE, assign, set_where
from .bits import narrow as take_byte

BLOCK = 64


def exact_dtypes(widths: tuple[int, int, int]) -> tuple[type, type]:
    """Smallest unsigned dtypes whose sums stay exact: of the first vertical box, and of all three.

    The sums of all six boxes are kept in uint64; where the second dtype is uint16 they need no
    more than 32 bits, and two rows share a word.
    """
    product = widths[0] * widths[1] * widths[2]
    narrow = np.uint8 if max(widths) <= 0xFF else np.uint16
    return narrow, np.uint16 if product <= 0xFFFF else np.uint32


def unit_scale(widths: tuple[int, int, int]) -> np.float32:
    """Factor that turns the full sum into 1; one step up, so that a full window reaches 1 before
    it is cut there.
    """
    full = float(widths[0] * widths[1] * widths[2]) ** 2
    return np.nextafter(np.float32(1 / full), np.float32(1))


@leaf
def add_row(total, entering):
    small = total.dtype.type
    for x in range(total.shape[0]):
        total[x] = small(total[x] + entering[x])


@leaf
def slide_row(before, entering, leaving, now):
    small = now.dtype.type
    for x in range(now.shape[0]):
        now[x] = small(before[x] + small(entering[x] - leaving[x]))


@leaf
def widen_row(source, target):
    """Copy into a wider dtype; apart from the sums, so that both loops run at full SIMD width."""
    wide = target.dtype.type
    for x in range(target.shape[0]):
        target[x] = wide(source[x])


@leaf
def next_sum(ring, y, first, r, height, before, now):
    """Vertical box sum of row y into `now` from the rows of `ring`, where row n lies in slot n
    modulo its length; `before` is the sum of row y - 1, unless y is the `first` one.

    One integer dtype. Past the picture its first and last rows repeat.
    """
    slots = ring.shape[0]
    if y == first:
        now[:] = now.dtype.type(0)
        for n in range(y - r, y + r + 1):
            add_row(now, ring[min(max(n, 0), height - 1) % slots])
    else:
        entering, leaving = min(y + r, height - 1) % slots, max(y - r - 1, 0) % slots
        slide_row(before, ring[entering], ring[leaving], now)


@leaf
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


@leaf
def third_difference(f, wa, wb, wc, out):
    """Differences over wa, wb and wc of the threefold running sum f [n + wa + wb + wc]."""
    wide = out.dtype.type
    n = out.shape[0]
    fa, fb, fc = f[wa : wa + n], f[wb : wb + n], f[wc : wc + n]
    fab, fac, fbc = f[wa + wb :], f[wa + wc :], f[wb + wc :]
    fabc = f[wa + wb + wc :]
    for i in range(n):
        plus = wide(wide(fabc[i] + fa[i]) + wide(fb[i] + fc[i]))
        minus = wide(wide(fab[i] + fac[i]) + wide(fbc[i] + f[i]))
        out[i] = wide(plus - minus)


@leaf
def box_ends(strip, ra, rb, rc, total):
    """The three boxes one after the other, repeating before each."""
    box_row(strip, total, ra)
    box_row(strip, total, rb)
    box_row(strip, total, rc)


@leaf
def box_span(values, ra, rb, rc, at_start, at_end, strips, total):
    """Three box sums of half widths ra, rb, rc along `values` [n], in place, modulo the dtype.

    With end values repeated once before all three, they are a third difference of the threefold
    running sum, one pass whatever the widths. Where the row changes near its start or end that is
    not what repeating before each pass gives, so those ends are done box by box.
    Scratch: strips [4 (ra + rb + rc)]; total [n + 2 (ra + rb + rc) + 3].
    """
    wide = values.dtype.type
    n, spread = values.shape[0], ra + rb + rc
    strip = 2 * spread
    if (at_start or at_end) and n <= strip:
        box_ends(values, ra, rb, rc, total)
        return
    start, end = strips[:strip], strips[strip : 2 * strip]
    if at_start:
        assign(values[:strip], start)
    if at_end:
        assign(values[n - strip :], end)
    once = twice = thrice = wide(0)
    for i in range(3):
        total[i] = thrice
    for i in range(spread):
        once = wide(once + values[0])
        twice = wide(twice + once)
        thrice = wide(thrice + twice)
        total[3 + i] = thrice
    middle = total[3 + spread : 3 + spread + n]
    for i in range(n):
        once = wide(once + values[i])
        twice = wide(twice + once)
        thrice = wide(thrice + twice)
        middle[i] = thrice
    for i in range(spread):
        once = wide(once + values[n - 1])
        twice = wide(twice + once)
        thrice = wide(thrice + twice)
        total[3 + spread + n + i] = thrice
    wa, wb, wc = 2 * ra + 1, 2 * rb + 1, 2 * rc + 1
    third_difference(total, wa, wb, wc, values)
    if at_start:
        box_ends(start, ra, rb, rc, total)
        assign(start[:spread], values[:spread])
    if at_end:
        box_ends(end, ra, rb, rc, total)
        assign(end[spread:], values[n - spread :])


@leaf
def is_level(row, value):
    """Whether every cell equals `value`."""
    other = row.dtype.type(0)
    for x in range(row.shape[0]):
        other |= row[x] ^ value
    return other == 0


@leaf
def level_span(row):
    """Where `row` changes: length of its constant head, and start of its constant tail.

    A row that never changes gives its length and 0.
    """
    n = row.shape[0]
    head = 0
    while head + BLOCK <= n and is_level(row[head : head + BLOCK], row[0]):
        head += BLOCK
    while head < n and row[head] == row[0]:
        head += 1
    tail = n
    while tail >= BLOCK and is_level(row[tail - BLOCK : tail], row[n - 1]):
        tail -= BLOCK
    while tail > 0 and row[tail - 1] == row[n - 1]:
        tail -= 1
    return head, tail


@leaf
def scale_row(values, factor):
    wide = values.dtype.type
    for x in range(values.shape[0]):
        values[x] = wide(values[x] * factor)


@leaf
def to_float(values, shift, scale, out):
    """The 32 bits of every word from bit `shift` on as a number, times `scale`, at most 1."""
    one = np.float32(1)
    for x in range(out.shape[0]):
        out[x] = min(np.float32(np.float32(np.uint32(values[x] >> shift)) * scale), one)


@leaf
def long_to_float(values, scale, out):
    """All 64 bits of every word as a number, times `scale`, at most 1."""
    one = np.float32(1)
    for x in range(out.shape[0]):
        out[x] = min(np.float32(np.float32(values[x]) * scale), one)


@leaf
def join_rows(low, high, target):
    """Two rows in one uint64 row: sums, differences and products by a number then act on both.

    Carries out of the low half are undone by the differences, because the final values fit 32 bits.
    """
    for x in range(target.shape[0]):
        target[x] = np.uint64(low[x]) | np.uint64(high[x]) << np.uint64(32)


@leaf
def box_rows(values, head, tail, radii, strips, total):
    """Three box sums along a row that is constant up to `head` and from `tail` on (`level_span`);
    only the part that changes is computed.
    """
    ra, rb, rc = radii
    width, spread = values.shape[0], ra + rb + rc
    area = np.uint64((2 * ra + 1) * (2 * rb + 1) * (2 * rc + 1))
    x0, x1 = max(0, head - spread), min(width, tail + spread)
    if head == width:
        x0, x1 = 0, 0
    scale_row(values[:x0], area)
    scale_row(values[x1:], area)
    if x1 > x0:
        at_start, at_end = head < spread, tail > width - spread
        box_span(values[x0:x1], ra, rb, rc, at_start, at_end, strips, total)


@leaf
def triple_box(
    words,
    height,
    y0,
    y1,
    radii,
    scale,
    row,
    bits,
    first,
    once,
    twice,
    thrice,
    values,
    strips,
    total,
    out,
    oy,
    ox,
):
    """Rows y0..y1 of the 0/1 picture `words` under three box filters of half widths `radii`, at
    (oy, ox) of `out`.

    scale: `unit_scale`. Scratch in the dtypes N, M of `exact_dtypes`: row uint8 [W]; bits N
    [slots, W], slots a multiple of 8 and at least 2 radii[0] + 9; first N [2, W]; once M [2
    radii[1] + 2, W]; twice M [2 radii[2] + 2, W]; thrice M [2, W]; values uint64 [W]; strips uint64
    [4 sum(radii)]; total uint64 [W + 2 sum(radii) + 3].
    """
    width = words.shape[1]
    ra, rb, rc = radii
    b0 = max(0, y0 - rc)
    a0 = max(0, b0 - rb)
    in_pairs = thrice.itemsize == 2
    first_head, first_tail = 0, width
    at, n1, n2 = max(0, a0 - ra) & ~(BYTE - 1), a0, b0
    for y in range(y0, y1):
        while n2 <= min(y + rc, height - 1):
            while n1 <= min(n2 + rb, height - 1):
                while at <= min(n1 + ra, height - 1):
                    take_byte(words[at >> 6], np.uint64(at & 63), row)
                    for j in range(BYTE):
                        set_where(row, np.uint8(1 << j), False, bits[(at + j) % bits.shape[0]])
                    at += BYTE
                now = first[n1 & 1]
                next_sum(bits, n1, a0, ra, height, first[1 - (n1 & 1)], now)
                widen_row(now, once[n1 % once.shape[0]])
                n1 += 1
            before = twice[max(n2 - 1, 0) % twice.shape[0]]
            next_sum(once, n2, b0, rb, height, before, twice[n2 % twice.shape[0]])
            n2 += 1
        sums = thrice[y & 1]
        next_sum(twice, y, y0, rc, height, thrice[1 - (y & 1)], sums)
        head, tail = level_span(sums)
        if not in_pairs:
            widen_row(sums, values)
            box_rows(values, head, tail, radii, strips, total)
            long_to_float(values, scale, out[y + oy, ox : ox + width])
        elif (y - y0) & 1 == 0 and y + 1 < y1:
            first_head, first_tail = head, tail
        else:
            other, alone = thrice[1 - (y & 1)], (y - y0) & 1 == 0
            if alone:
                join_rows(sums, sums, values)
            else:
                head, tail = min(head, first_head), max(tail, first_tail)
                join_rows(other, sums, values)
            box_rows(values, head, tail, radii, strips, total)
            if not alone:
                to_float(values, np.uint64(0), scale, out[y - 1 + oy, ox : ox + width])
            to_float(values, np.uint64(32), scale, out[y + oy, ox : ox + width])


@leaf
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


@leaf
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
