"""Binary masks as vertical bit planes: 64 rows of a column in one word.

`words` is uint64 [K, W] with K = ceil(H / 64); bit j of words[k, x] is the pixel of row 64 k + j,
column x. Bits of rows at and past H ("pad bits") are always 0. Logic on 64 rows is then one SIMD
loop along x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import njit_no_refcount

ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
ONE = np.uint64(1)
BYTE = 8


def _count_trailing_zeros(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


def _count_ones(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


# Number of zero bits below the lowest set bit of a uint64 (undefined for 0), and of its set bits.
trailing_zeros: Any = intrinsic(_count_trailing_zeros)
popcount: Any = intrinsic(_count_ones)


@njit_no_refcount
def assign(source, target):
    """Copy a row to another place of the same length; numpy's way would allow for overlap first."""
    for x in range(target.shape[0]):
        target[x] = source[x]


@njit_no_refcount
def valid_bits(k, height):
    """uint64 with a bit set for every row of word row k that lies inside the picture."""
    rows = height - 64 * k
    if rows >= 64:
        return ALL
    return (ONE << np.uint64(rows)) - ONE


@njit_no_refcount
def compare_eight(image, y, threshold, row):
    """Bit i of the byte row: whether row y + i of `image` lies above the threshold, for 8 rows."""
    a, b, c, d = image[y], image[y + 1], image[y + 2], image[y + 3]
    e, f, g, h = image[y + 4], image[y + 5], image[y + 6], image[y + 7]
    for x in range(row.shape[0]):
        byte = np.uint8(np.uint8(a[x] > threshold) | np.uint8(b[x] > threshold) << 1)
        byte = np.uint8(byte | np.uint8(c[x] > threshold) << 2)
        byte = np.uint8(byte | np.uint8(d[x] > threshold) << 3)
        byte = np.uint8(byte | np.uint8(e[x] > threshold) << 4)
        byte = np.uint8(byte | np.uint8(f[x] > threshold) << 5)
        byte = np.uint8(byte | np.uint8(g[x] > threshold) << 6)
        row[x] = np.uint8(byte | np.uint8(h[x] > threshold) << 7)


@njit_no_refcount
def compare_one(values, threshold, row):
    """1 where a value lies above the threshold, else 0."""
    for x in range(row.shape[0]):
        row[x] = np.uint8(values[x] > threshold)


@njit_no_refcount
def insert(row, shift, word):
    """OR a byte row, moved up by `shift` bits, into a word row."""
    for x in range(row.shape[0]):
        word[x] |= np.uint64(row[x]) << shift


@njit_no_refcount
def pack(image, threshold, words, row, k0, k1):
    """Word rows k0..k1 of `words` from float32 [H, W] `image`: bit = value > threshold, so NaN
    gives 0.

    row: uint8 [W] scratch. The loops along x are functions of their own, here and in the other
    kernels: LLVM then sees plain rows that do not overlap, and vectorises at full width.
    """
    height = image.shape[0]
    for k in range(k0, k1):
        word = words[k]
        word[:] = np.uint64(0)
        first = 64 * k
        rows = min(64, height - first)
        j = 0
        while j < rows:
            if j + BYTE <= rows:
                compare_eight(image, first + j, threshold, row)
                insert(row, np.uint64(j), word)
                j += BYTE
            else:
                compare_one(image[first + j], threshold, row)
                insert(row, np.uint64(j), word)
                j += 1


@njit_no_refcount
def narrow(word, shift, row):
    """Bits shift..shift + 7 of a word row as bytes."""
    for x in range(row.shape[0]):
        row[x] = np.uint8(word[x] >> shift)


@njit_no_refcount
def set_where(row, bit, inverted, out):
    """1 where `bit` is set in the byte row (or, `inverted`, where it is clear), else 0."""
    if inverted:
        for x in range(out.shape[0]):
            out[x] = np.uint8((row[x] & bit) == 0)
    else:
        for x in range(out.shape[0]):
            out[x] = np.uint8((row[x] & bit) != 0)


@njit_no_refcount
def set_float(row, bit, out):
    """1.0 where `bit` is set in the byte row, else 0.0."""
    zero, one = np.float32(0), np.float32(1)
    for x in range(out.shape[0]):
        out[x] = zero if np.uint8(row[x] & bit) == 0 else one


@njit_no_refcount
def unpack_bytes(words, target, inverted, row, y0, y1):
    """Rows y0..y1 of the bits, as 0 and 1 (1 and 0 if `inverted`), into `target` [y1 - y0, W].

    `target` is of any unsigned dtype; `row` is scratch, uint8 [W].
    """
    y = y0
    while y < y1:
        end = min(y1, (y | (BYTE - 1)) + 1)
        narrow(words[y >> 6], np.uint64(y & 63 & ~(BYTE - 1)), row)
        while y < end:
            set_where(row, np.uint8(1 << (y & (BYTE - 1))), inverted, target[y - y0])
            y += 1


@njit_no_refcount
def unpack_float(words, target, row, y0, y1, oy, ox):
    """Rows y0..y1 of the bits, as 0.0 and 1.0, at (oy, ox) of float32 [H, W] `target`.

    row: uint8 [W] scratch.
    """
    width = words.shape[1]
    y = y0
    while y < y1:
        end = min(y1, (y | (BYTE - 1)) + 1)
        narrow(words[y >> 6], np.uint64(y & 63 & ~(BYTE - 1)), row)
        while y < end:
            bit = np.uint8(1 << (y & (BYTE - 1)))
            set_float(row, bit, target[y + oy, ox : ox + width])
            y += 1


@njit_no_refcount
def complement(words, height):
    """Flip every bit inside the picture, in place; pad bits stay 0."""
    for k in range(words.shape[0]):
        flip = valid_bits(k, height)
        word = words[k]
        for x in range(word.shape[0]):
            word[x] ^= flip


@njit_no_refcount
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


@njit_no_refcount
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


@njit_no_refcount
def copy_row(source, target):
    """Copy a float32 row, NaN as 0."""
    zero = np.float32(0)
    for x in range(target.shape[0]):
        target[x] = source[x] if source[x] == source[x] else zero


@njit_no_refcount
def copy_numbers(source, target):
    """Copy float32 [H, W], NaN as 0."""
    for y in range(source.shape[0]):
        copy_row(source[y], target[y])


@njit_no_refcount
def row_is_hard(row):
    """Whether every value of the row is 0, 1 or NaN (which counts as 0)."""
    zero, one = np.float32(0), np.float32(1)
    grey = np.uint8(0)
    for x in range(row.shape[0]):
        grey |= np.uint8(row[x] == row[x]) & np.uint8(row[x] != zero) & np.uint8(row[x] != one)
    return grey == 0


@njit_no_refcount
def is_hard(image):
    """Whether float32 [H, W] `image` holds only 0, 1 and NaN."""
    y = 0
    while y < image.shape[0] and row_is_hard(image[y]):
        y += 1
    return y == image.shape[0]
