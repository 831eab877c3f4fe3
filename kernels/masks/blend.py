"""Blending one picture into another through a mask, row by row."""

from __future__ import annotations

import numpy as np

from ._jit import njit_no_refcount
from .bits import assign

NONE, PART, ALL = 0, 1, 2
BLOCK = 64


@njit_no_refcount
def coverage(mask):
    """NONE, ALL or PART of a mask row: whether every value is 0 (or NaN), every value is 1, or
    neither.
    """
    some, less = np.uint8(0), np.uint8(0)
    for x in range(mask.shape[0]):
        some |= np.uint8(mask[x] != np.float32(0)) & np.uint8(mask[x] == mask[x])
        less |= np.uint8(mask[x] != np.float32(1))
    if some == 0:
        return NONE
    return PART if less else ALL


@njit_no_refcount
def repeat_channels(mask, channels, out):
    """Every mask value `channels` times, NaN as 0."""
    zero = np.float32(0)
    if channels == 3:  # written out, LLVM turns it into SIMD
        for x in range(mask.shape[0]):
            value = mask[x] if mask[x] == mask[x] else zero
            out[3 * x] = value
            out[3 * x + 1] = value
            out[3 * x + 2] = value
    else:
        for x in range(mask.shape[0]):
            value = mask[x] if mask[x] == mask[x] else zero
            for c in range(channels):
                out[channels * x + c] = value


@njit_no_refcount
def mix(under, over, weight, out):
    """weight over + (1 - weight) under; `under` itself where weight is 0, whatever `over` holds."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(out.shape[0]):
        w = weight[i]
        value = np.float32(w * over[i]) + np.float32(np.float32(one - w) * under[i])
        out[i] = under[i] if w == zero else value


@njit_no_refcount
def blend(destination, source, mask, channels, oy, ox, weight, out):
    """`source` blended into the picture `destination` with its corner at row oy, column ox; what
    sticks out is cut off.

    destination, out: float32 [H, W C]; source: float32 [h, w C]; mask: float32 [h, w]; weight:
    float32 [w C] scratch. Every row is written once, and nothing that was written is read.
    """
    width = out.shape[1] // channels
    x0, x1 = max(0, ox), min(width, ox + mask.shape[1])
    for y in range(out.shape[0]):
        xa, xb = x0, x1
        if oy <= y < oy + mask.shape[0]:
            row = mask[y - oy]
            while xa + BLOCK <= xb and coverage(row[xa - ox : xa + BLOCK - ox]) == NONE:
                xa += BLOCK
            while xa + BLOCK <= xb and coverage(row[xb - BLOCK - ox : xb - ox]) == NONE:
                xb -= BLOCK
        else:
            xb = xa
        if xa >= xb:
            assign(destination[y], out[y])
            continue
        row = mask[y - oy, xa - ox : xb - ox]
        a, b = channels * xa, channels * xb
        over = source[y - oy, a - channels * ox : b - channels * ox]
        under, target = destination[y, a:b], out[y, a:b]
        assign(destination[y, :a], out[y, :a])
        assign(destination[y, b:], out[y, b:])
        kind = coverage(row)
        if kind == PART:
            part = weight[: b - a]
            repeat_channels(row, channels, part)
            mix(under, over, part, target)
        else:
            assign(over if kind == ALL else under, target)
