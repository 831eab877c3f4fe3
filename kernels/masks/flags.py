"""Leaf kernels of the agnostic mask: labels to bit planes, and a Gaussian that ends in a bit."""

from __future__ import annotations

import numpy as np

from ._jit import leaf
from .bits import BYTE, narrow, set_where, valid_bits

PLANES = 7
GAP = 64


@leaf
def look_up(first, second, third, tables, shift, packed):
    """OR the set bits of one row of three label maps, moved up by `shift`, into uint64 `packed`."""
    for x in range(packed.shape[0]):
        flags = tables[0, first[x]] | tables[1, second[x]] | tables[2, third[x]]
        packed[x] |= np.uint64(flags) << shift


@leaf
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


@leaf
def insert_byte(packed, byte, shift, word):
    """OR one byte of every packed word, moved up by `shift`, into a word row."""
    for x in range(packed.shape[0]):
        word[x] |= ((packed[x] >> byte) & np.uint64(0xFF)) << shift


@leaf
def pack_flags(first, second, third, tables, planes, packed):
    """Bit planes, uint64 [7, K, W]: plane b holds the pixels where bit b of the three labels' flags
    is set.

    first, second, third: label maps uint8 [H, W]; tables: uint8 [3, 256]; packed: uint64 [W].
    """
    planes[:] = np.uint64(0)
    height = first.shape[0]
    for y0 in range(0, height, BYTE):
        packed[:] = np.uint64(0)
        for y in range(y0, min(height, y0 + BYTE)):
            shift = np.uint64(BYTE * (y - y0))
            look_up(first[y], second[y], third[y], tables, shift, packed)
        transpose_bytes(packed)
        for b in range(PLANES):
            insert_byte(packed, np.uint64(BYTE * b), np.uint64(y0 & 63), planes[b, y0 >> 6])


@leaf
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


@leaf
def mirror(n, size):
    """Index n reflected into 0..size - 1, the border itself not repeated."""
    while n < 0 or n >= size:
        if size == 1:
            return 0
        n = -n if n < 0 else 2 * (size - 1) - n
    return n


@leaf
def add_two(a, b, c, d, near, far, total):
    """total += near (a + b) + far (c + d), uint16 modulo 2^16."""
    small = np.uint16
    for x in range(total.shape[0]):
        first = small(near * small(a[x] + b[x]))
        total[x] = small(total[x] + small(first + small(far * small(c[x] + d[x]))))


@leaf
def add_pair(left, right, tap, total):
    """total += tap (left + right), uint32."""
    wide = np.uint32
    for x in range(total.shape[0]):
        total[x] = wide(total[x] + wide(tap * wide(left[x] + right[x])))


@leaf
def scale_into(values, tap, total):
    one = total.dtype.type
    for x in range(total.shape[0]):
        total[x] = one(tap * one(values[x]))


@leaf
def put_bits(total, least, shift, word):
    """Set or clear one bit of every word: whether total >= least."""
    bit = np.uint64(1) << shift
    for x in range(total.shape[0]):
        hit = np.uint64(total[x] >= least) << shift
        word[x] = (word[x] & ~bit) | hit


@leaf
def blur_threshold(padded, height, band, taps, least, byte, ring, sums, wide, total, words):
    """Where the Gaussian of a 0/1 picture reaches a value: sets or clears bits of `words`.

    padded: uint64 [K, W + 2 r], the picture mirrored past its sides. taps: uint32 [r + 2], the
    centre, one side and a 0, summing to at most 2^15 with both sides. least: uint32, on the scale
    of the squared sum. band: uint64 [K, W], the pixels that may change; eight rows and their spans
    of columns are done together. Scratch: byte uint8 [W + 2 r]; ring uint16 [slots, W + 2 r], slots
    a multiple of 8 and at least 2 r + 17; sums uint16 [W + 2 r]; wide and total uint32 [W + 2 r].
    """
    width = words.shape[1]
    r = taps.shape[0] - 2
    slots = ring.shape[0]
    ready = 0
    for y0 in range(0, height, BYTE):
        while ready < min(height, y0 + BYTE + r + 1):
            narrow(padded[ready >> 6], np.uint64(ready & 63), byte)
            for j in range(BYTE):
                set_where(byte, np.uint8(1 << j), False, ring[(ready + j) % slots])
            ready += BYTE
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
            n = xb - xa + 2 * r
            part, row, out = sums[:n], wide[:n], total[: xb - xa]
            for y in range(y0, min(height, y0 + BYTE)):
                scale_into(ring[y % slots, xa : xa + n], np.uint16(taps[0]), part)
                for d in range(1, r + 1, 2):
                    add_two(
                        ring[mirror(y - d, height) % slots, xa : xa + n],
                        ring[mirror(y + d, height) % slots, xa : xa + n],
                        ring[mirror(y - d - 1, height) % slots, xa : xa + n],
                        ring[mirror(y + d + 1, height) % slots, xa : xa + n],
                        np.uint16(taps[d]),
                        np.uint16(taps[d + 1]),
                        part,
                    )
                scale_into(part, np.uint32(1), row)
                scale_into(row[r : r + xb - xa], taps[0], out)
                for d in range(1, r + 1):
                    left, right = row[r - d : r - d + xb - xa], row[r + d : r + d + xb - xa]
                    add_pair(left, right, taps[d], out)
                put_bits(out, least, np.uint64(y & 63), words[y0 >> 6, xa:xb])
