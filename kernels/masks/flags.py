"""Leaf kernels of the agnostic mask: labels to bit planes, and a Gaussian that ends in a bit."""

from __future__ import annotations

import numpy as np

from ._jit import njit_no_refcount
from .bits import BYTE, ONE, valid_bits
from .boxblur import add_steps, find_edges

PLANES = 7
# Spans nearer than this are done as one, in rounds of the vectorised loop.
GAP, ROUND = 16, 32


@njit_no_refcount
def look_up(first, second, third, tables, flags):
    """The set bits of one row of three label maps, ORed, into uint8 `flags`.

    Parts are wide: eight cells at a time that are the same as the eight before take their result.
    """
    whole = flags.shape[0] // BYTE
    a8, b8 = first[: BYTE * whole].view(np.uint64), second[: BYTE * whole].view(np.uint64)
    c8, flags8 = third[: BYTE * whole].view(np.uint64), flags[: BYTE * whole].view(np.uint64)
    for n in range(whole):
        known = n > 0 and a8[n] == a8[n - 1] and b8[n] == b8[n - 1] and c8[n] == c8[n - 1]
        if known:
            flags8[n] = flags8[n - 1]
        else:
            for x in range(BYTE * n, BYTE * n + BYTE):
                flags[x] = tables[0, first[x]] | tables[1, second[x]] | tables[2, third[x]]
    for x in range(BYTE * whole, flags.shape[0]):
        flags[x] = tables[0, first[x]] | tables[1, second[x]] | tables[2, third[x]]


@njit_no_refcount
def transpose_bytes(packed):
    """Bit b of byte i becomes bit i of byte b, in every word (Hacker's Delight, 7-3)."""
    for x in range(packed.shape[0]):
        w = packed[x]
        t = (w ^ (w >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
        w = w ^ t ^ (t << np.uint64(7))
        t = (w ^ (w >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
        w = w ^ t ^ (t << np.uint64(14))
        t = (w ^ (w >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
        packed[x] = w ^ t ^ (t << np.uint64(28))


@njit_no_refcount
def insert_byte(packed, byte, shift, word):
    """OR one byte of every packed word, moved up by `shift`, into a word row."""
    for x in range(packed.shape[0]):
        word[x] |= ((packed[x] >> byte) & np.uint64(0xFF)) << shift


@njit_no_refcount
def join_eight(rows, packed):
    """Eight byte rows in one uint64 row."""
    a, b, c, d, e, f, g, h = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
    wide = np.uint64
    for x in range(packed.shape[0]):
        low = wide(a[x]) | wide(b[x]) << wide(8) | wide(c[x]) << wide(16) | wide(d[x]) << wide(24)
        high = wide(e[x]) | wide(f[x]) << wide(8) | wide(g[x]) << wide(16) | wide(h[x]) << wide(24)
        packed[x] = low | high << wide(32)


@njit_no_refcount
def pack_flags(first, second, third, tables, planes, flags, packed):
    """Bit planes, uint64 [7, K, W]: plane b holds the pixels where bit b of the three labels' flags
    is set.

    first, second, third: label maps uint8 [H, W]; tables: uint8 [3, 256]. Scratch: flags uint8 [8,
    W], packed uint64 [W].
    """
    planes[:] = np.uint64(0)
    height = first.shape[0]
    for y0 in range(0, height, BYTE):
        if y0 + BYTE > height:
            flags[:] = 0
        for j in range(min(BYTE, height - y0)):
            look_up(first[y0 + j], second[y0 + j], third[y0 + j], tables, flags[j])
        join_eight(flags, packed)
        transpose_bytes(packed)
        for b in range(PLANES):
            insert_byte(packed, np.uint64(BYTE * b), np.uint64(y0 & 63), planes[b, y0 >> 6])


@njit_no_refcount
def enlarge(quarter, height, out):
    """Every pixel of `quarter` as 4 x 4 pixels of uint64 [K, W] `out`."""
    for k in range(out.shape[0]):
        keep = valid_bits(k, height)
        source, shift = quarter[k >> 2], np.uint64(16 * (k & 3))
        for x in range(out.shape[1]):
            b = (source[x >> 2] >> shift) & np.uint64(0xFFFF)
            b = (b | b << np.uint64(24)) & np.uint64(0x000000FF000000FF)
            b = (b | b << np.uint64(12)) & np.uint64(0x000F000F000F000F)
            b = (b | b << np.uint64(6)) & np.uint64(0x0303030303030303)
            b = (b | b << np.uint64(3)) & np.uint64(0x1111111111111111)
            out[k, x] = (b * np.uint64(15)) & keep


@njit_no_refcount
def mirror(n, size):
    """Index n reflected into 0..size - 1, the border itself not repeated."""
    while n < 0 or n >= size:
        if size == 1:
            return 0
        n = -n if n < 0 else 2 * (size - 1) - n
    return n


@njit_no_refcount
def add_two(a, b, c, d, near, far, total):
    """total += near (a + b) + far (c + d), uint32."""
    wide = np.uint32
    for x in range(total.shape[0]):
        first = wide(near * wide(wide(a[x]) + wide(b[x])))
        total[x] = wide(total[x] + wide(first + wide(far * wide(wide(c[x]) + wide(d[x])))))


@njit_no_refcount
def scale_into(values, tap, total):
    """One weight times a row, as uint32, in place of what `total` held."""
    for x in range(total.shape[0]):
        total[x] = np.uint32(tap * np.uint32(values[x]))


@njit_no_refcount
def weigh_rows(ring, above, below, taps, x0, total):
    """The kernel's sum over rows, columns from x0 on, into uint32 `total`; above and below: the
    slots of the rows at each distance.
    """
    x1 = x0 + total.shape[0]
    scale_into(ring[above[0], x0:x1], taps[0], total)
    for d in range(1, taps.shape[0] - 1, 2):
        add_two(
            ring[above[d], x0:x1],
            ring[below[d], x0:x1],
            ring[above[d + 1], x0:x1],
            ring[below[d + 1], x0:x1],
            taps[d],
            taps[d + 1],
            total,
        )


@njit_no_refcount
def put_bits(total, least, shift, word):
    """Set or clear one bit of every word: whether total >= least."""
    bit = np.uint64(1) << shift
    for x in range(word.shape[0]):
        hit = np.uint64(total[x] >= least) << shift
        word[x] = (word[x] & ~bit) | hit


@njit_no_refcount
def blur_threshold(
    padded, height, band, taps, curve, least, edges, count, ring, near, total, words
):
    """Where the Gaussian of a 0/1 picture reaches a value: sets or clears bits of `words`.

    padded: uint64 [K, W + 2 r], the picture mirrored past its sides. taps: uint32 [r + 2], the
    centre, one side and a 0, summing to at most 2^15 with both sides. curve: uint16 [2 r + 1], the
    running sums of all taps. least: uint32, on the scale of the squared sum. band: uint64 [K, W],
    the pixels that may change; eight rows and their spans of columns are done together. Scratch:
    edges int32 [64, W + 2 r]; count int64 [64]; ring uint16 [a power of two of at least 2 r + 10, W
    + 2 r + ROUND]; near int64 [16, r + 2]; total uint32 [W + ROUND].
    """
    width = words.shape[1]
    r = taps.shape[0] - 2
    last = ring.shape[0] - 1
    ready = 0
    for y0 in range(0, height, BYTE):
        while ready < min(height, y0 + BYTE + r + 1):
            word = padded[ready >> 6]
            if ready & 63 == 0:
                find_edges(word, edges, count)
            first = (word[0] >> np.uint64(ready & 63)) & ONE
            found = edges[ready & 63, : count[ready & 63]]
            row = ring[ready & last, : width + 2 * r]
            add_steps(found, first, r, curve[: 2 * r], curve[2 * r], row)
            ready += 1
        for j in range(BYTE):
            for d in range(r + 2):
                near[2 * j, d] = mirror(y0 + j - d, height) & last
                near[2 * j + 1, d] = mirror(y0 + j + d, height) & last
        word, shift = band[y0 >> 6], np.uint64(y0 & 63)
        x = 0
        while x < width:
            while x < width and (word[x] >> shift) & np.uint64(0xFF) == np.uint64(0):
                x += 1
            if x == width:
                break
            xa, xb = x, x + 1
            while x < width and x - xb < GAP:
                if (word[x] >> shift) & np.uint64(0xFF) != np.uint64(0):
                    xb = x + 1
                x += 1
            out = total[: -(-(xb - xa) // ROUND) * ROUND]
            for j in range(min(BYTE, height - y0)):
                weigh_rows(ring, near[2 * j], near[2 * j + 1], taps, r + xa, out)
                put_bits(out, least, np.uint64((y0 & 63) + j), words[y0 >> 6, xa:xb])
