"""GGUF's quantised blocks as weights: how each type lays out a block, and its values.

A tensor is a row of blocks of `values` numbers in `size` bytes. A block holds small integers, one
or two 16-bit floats, and in the K types scales of 4 to 8 bits that these multiply; every formula is
that of the ggml project's reference, in float32 and in its order of operations.

Only operations on the device of the blocks are used, and nothing is copied to it, so that unpacking
a layer never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Values unpacked at a time: working memory of about 64 MB on a device, and on a CPU what stays in
# its caches.
PIECE, CPU_PIECE = 1 << 22, 1 << 20
# The sixteen values of the types IQ4.
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """`floats`: where in a block its 16-bit floats are -> the largest number that each is
    multiplied with.
    """

    values: int
    size: int
    floats: Mapping[int, int]
    unpack: Callable[[torch.Tensor], torch.Tensor]


def dequantise(blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight [rows, width] in `dtype`, each value rounded once, from uint8 blocks [rows, bytes
    of a row] of one of TYPES.
    """
    form, (rows, row_bytes) = TYPES[kind], blocks.shape
    per_row = row_bytes // form.size
    width = per_row * form.values
    out = torch.empty(rows, width, dtype=dtype, device=blocks.device)
    piece = CPU_PIECE if blocks.device.type == "cpu" else PIECE
    # A compiler joins the operations itself, and would repeat the code for each piece.
    step = rows if torch.compiler.is_compiling() else max(1, piece // width)
    for start in range(0, rows, step):
        part = blocks[start : start + step].reshape(-1, form.size)
        out[start : start + step] = form.unpack(part).reshape(-1, width)
    return out


def largest(blocks: torch.Tensor, kind: str) -> float:
    """A bound on the absolute values that blocks stand for, from their 16-bit floats alone; not
    finite if one of these is not. Reads every block and waits for the result.
    """
    form = TYPES[kind]
    every = blocks.reshape(-1, form.size)
    tops = [_float(every, at).abs().amax() * most for at, most in form.floats.items()]
    return float(torch.stack(tops).sum())


def _float(b: torch.Tensor, at: int) -> torch.Tensor:
    """The 16-bit float at byte `at`, [blocks, 1] in float32."""
    return b[:, at : at + 2].view(torch.float16).float()


def _fields(b: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Fields of `bits` bits: of each run of bytes the lowest fields, then the next ones: uint8
    [blocks, bytes * 8 / bits].
    """
    n, size = b.shape
    parts = b.reshape(n, size // run, run)
    mask = (1 << bits) - 1
    top = 8 - bits
    found = [parts & mask, *((parts >> shift) & mask for shift in range(bits, top, bits))]
    found.append(parts >> top)
    return torch.stack(found, dim=2).reshape(n, -1)


def _bits(b: torch.Tensor) -> torch.Tensor:
    """Bits of 4 bytes, lowest first: uint8 [blocks, 32]."""
    found = torch.stack([(b >> shift) & 1 for shift in range(8)], dim=2)
    return found.reshape(b.shape[0], -1)


def _scaled(q: torch.Tensor, scale: torch.Tensor, least: torch.Tensor | None = None):
    """q * scale - least, [blocks, values] with a scale and least for each of equal groups."""
    grouped = q.float().reshape(q.shape[0], scale.shape[1], -1)
    grouped.mul_(scale[:, :, None])
    if least is not None:
        grouped.sub_(least[:, :, None])
    return grouped


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _scaled(b[:, 2:].view(torch.int8), _float(b, 0))


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_fields(b[:, 2:], 4, 16).view(torch.int8) - 8, _float(b, 0))


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_fields(b[:, 4:], 4, 16), _float(b, 0), -_float(b, 2))


def _fifth(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return _fields(low, 4, 16) | (_bits(high) << 4)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_fifth(b[:, 6:], b[:, 2:6]).view(torch.int8) - 16, _float(b, 0))


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_fifth(b[:, 8:], b[:, 4:8]), _float(b, 0), -_float(b, 2))


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales = b[:, :16]
    scale, least = _float(b, 80) * (scales & 15), _float(b, 82) * (scales >> 4)
    return _scaled(_fields(b[:, 16:80], 2, 32), scale, least)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    # A scale's six bits are in two places, and a value is four less where its third bit is not set.
    scales = _fields(b[:, 96:104], 4, 8) | (_fields(b[:, 104:108], 2, 4) << 4)
    third = _fields(b[:, :32], 1, 32) << 2
    q = (_fields(b[:, 32:96], 2, 32) | third).view(torch.int8) - 4
    return _scaled(q, _float(b, 108) * (scales.view(torch.int8) - 32))


def _six_bits(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K, times their floats: [blocks, 8] each."""
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((first & 63, (both & 15) | ((first >> 6) << 4)), dim=1)
    least = torch.cat((second & 63, (both >> 4) | ((second >> 6) << 4)), dim=1)
    return _float(b, 0) * scale, _float(b, 2) * least


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_fields(b[:, 16:], 4, 32), *_six_bits(b))


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    q = _fields(b[:, 48:], 4, 32) | (_fields(b[:, 16:48], 1, 32) << 4)
    return _scaled(q, *_six_bits(b))


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    q = _fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << 4)
    scale = _float(b, 208) * b[:, 192:208].view(torch.int8)
    return _scaled(q.view(torch.int8) - 32, scale)


def _uneven(q: torch.Tensor) -> torch.Tensor:
    # Filled on the device: a table copied to it would make the host wait.
    table = torch.cat([torch.full((1,), float(v), device=q.device) for v in UNEVEN])
    return table[q.int()]


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    return _scaled(_uneven(_fields(b[:, 2:], 4, 16)), _float(b, 0))


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    high = torch.cat((_fields(b[:, 2:3], 2, 1), _fields(b[:, 3:4], 2, 1)), dim=1)
    scales = _fields(b[:, 4:8], 4, 1) | (high << 4)
    return _scaled(_uneven(_fields(b[:, 8:], 4, 16)), _float(b, 0) * (scales.view(torch.int8) - 32))


TYPES: Mapping[str, BlockType] = {
    "Q8_0": BlockType(32, 34, {0: 128}, _q8_0),
    "Q6_K": BlockType(256, 210, {208: 128 * 32}, _q6_k),
    "Q5_K": BlockType(256, 176, {0: 63 * 31, 2: 63}, _q5_k),
    "Q5_1": BlockType(32, 24, {0: 31, 2: 1}, _q5_1),
    "Q5_0": BlockType(32, 22, {0: 16}, _q5_0),
    "Q4_K": BlockType(256, 144, {0: 63 * 15, 2: 63}, _q4_k),
    "Q4_1": BlockType(32, 20, {0: 15, 2: 1}, _q4_1),
    "Q4_0": BlockType(32, 18, {0: 8}, _q4_0),
    "IQ4_XS": BlockType(256, 136, {0: 32 * 127}, _iq4_xs),
    "IQ4_NL": BlockType(32, 18, {0: 127}, _iq4_nl),
    "Q3_K": BlockType(256, 110, {108: 32 * 4}, _q3_k),
    "Q2_K": BlockType(256, 84, {80: 15 * 3, 82: 15}, _q2_k),
}
