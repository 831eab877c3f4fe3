"""Binary masks as vertical bit planes: 64 rows of a column in one word.

`words` is uint64 [K, W] with K = ceil(H / 64); bit j of words[k, x] is the pixel of row 64 k + j,
column x. Bits of rows at and past H ("pad bits") are always 0. Logic on 64 rows is then one SIMD
loop along x.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import njit

ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
ONE = np.uint64(1)
BYTE = 8


@intrinsic
def trailing_zeros(typingctx, value):
    """Number of zero bits below the lowest set bit of a uint64; undefined for 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def popcount(typingctx, value):
    """Number of set bits of a uint64."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@njit
def valid_bits(k, height):
    """uint64 with a bit set for every row of word row k that lies inside the picture."""
    rows = height - 64 * k
    if rows >= 64:
        return ALL
    return (ONE << np.uint64(rows)) - ONE


@njit
def pack(image, threshold, words, row, k0, k1):
    """Word rows k0..k1 of `words` from float32 [H, W] `image`: bit = value > threshold, so NaN
    gives 0.

    `row` is scratch, uint8 [W].
    """
    height, width = image.shape
    for k in range(k0, k1):
        word = words[k]
        for x in range(width):
            word[x] = np.uint64(0)
        first = 64 * k
        rows = min(64, height - first)
        j = 0
        while j < rows:
            shift = np.uint64(j)
            if j + BYTE <= rows:
                y = first + j
                a, b, c, d = image[y], image[y + 1], image[y + 2], image[y + 3]
                e, f, g, h = image[y + 4], image[y + 5], image[y + 6], image[y + 7]
                for x in range(width):
                    low = np.uint8(a[x] > threshold) | np.uint8(b[x] > threshold) << 1
                    low = np.uint8(low | np.uint8(c[x] > threshold) << 2)
                    low = np.uint8(low | np.uint8(d[x] > threshold) << 3)
                    low = np.uint8(low | np.uint8(e[x] > threshold) << 4)
                    low = np.uint8(low | np.uint8(f[x] > threshold) << 5)
                    low = np.uint8(low | np.uint8(g[x] > threshold) << 6)
                    row[x] = np.uint8(low | np.uint8(h[x] > threshold) << 7)
                j += BYTE
            else:
                a = image[first + j]
                for x in range(width):
                    row[x] = np.uint8(a[x] > threshold)
                j += 1
            for x in range(
                width
            ):  # widening apart from the comparison keeps both loops at full SIMD width
                word[x] |= np.uint64(row[x]) << shift


@njit
def unpack_bytes(words, target, clear, full, row, y0, y1):
    """Rows y0..y1 of the bits into uint8 [y1 - y0, W] `target`: `clear` where the bit is 0, `full`
    where it is 1.
    """
    width = words.shape[1]
    low, flip = np.uint8(clear), np.uint8(clear ^ full)
    y = y0
    while y < y1:
        k, j = y >> 6, y & 63
        end = min(y1, (y | (BYTE - 1)) + 1)
        shift = np.uint64(j & ~(BYTE - 1))
        word = words[k]
        for x in range(width):
            row[x] = np.uint8(word[x] >> shift)
        while y < end:
            one = np.uint8(1 << (y & (BYTE - 1)))
            out = target[y - y0]
            for x in range(width):
                hit = np.uint8(0) if np.uint8(row[x] & one) == 0 else np.uint8(255)
                out[x] = np.uint8(low ^ np.uint8(hit & flip))
            y += 1


@njit
def unpack_float(words, target, row, y0, y1, oy, ox):
    """Rows y0..y1 of the bits, as 0.0 and 1.0, at (oy, ox) of float32 [H, W] `target`. `row`:
    uint8 [W] scratch.
    """
    width = words.shape[1]
    zero, one = np.float32(0), np.float32(1)
    y = y0
    while y < y1:
        end = min(y1, (y | (BYTE - 1)) + 1)
        shift = np.uint64(y & 63 & ~(BYTE - 1))
        word = words[y >> 6]
        for x in range(width):
            row[x] = np.uint8(word[x] >> shift)
        while y < end:
            bit = np.uint8(1 << (y & (BYTE - 1)))
            out = target[y + oy, ox : ox + width]
            for x in range(width):
                out[x] = zero if np.uint8(row[x] & bit) == 0 else one
            y += 1


@njit
def complement(words, height):
    """Flip every bit inside the picture, in place; pad bits stay 0."""
    for k in range(words.shape[0]):
        flip = valid_bits(k, height)
        word = words[k]
        for x in range(word.shape[0]):
            word[x] ^= flip


@njit
def paint(words, bits, value, image):
    """Write `value` into float32 [H, W] `image` wherever `bits` differs from `words` (both uint64
    [K, W]).
    """
    for k in range(words.shape[0]):
        for x in range(words.shape[1]):
            left = words[k, x] ^ bits[k, x]
            while left != np.uint64(0):
                image[64 * k + np.int64(trailing_zeros(left)), x] = value
                left &= left - ONE


@njit
def extent(words, ends):
    """First and one-past-last set column of every word row into int64 [K, 2] `ends`; an empty row
    gives W, 0.
    """
    count, width = words.shape
    for k in range(count):
        word = words[k]
        first = 0
        while first < width and word[first] == np.uint64(0):
            first += 1
        last = width
        while last > first and word[last - 1] == np.uint64(0):
            last -= 1
        ends[k, 0] = first
        ends[k, 1] = last if last > first else 0


@njit
def flag_positive(image, columns, y0, y1):
    """OR `value > 0` of rows y0..y1 of float32 [H, W] into uint8 [W] `columns`; returns first row,
    one-past-last row.
    """
    width = image.shape[1]
    top, bottom = y1, y0
    for y in range(y0, y1):
        row = image[y]
        any_set = np.uint8(0)
        for x in range(width):
            hit = np.uint8(row[x] > np.float32(0))
            columns[x] = np.uint8(columns[x] | hit)
            any_set = np.uint8(any_set | hit)
        if any_set:
            top = min(top, y)
            bottom = y + 1
    return top, bottom
