"""Linear weights packed as small integers, as GPTQ, AWQ, GGUF and ComfyUI's awq_w4a16 files hold
them.

GPTQ and AWQ store the transposed weight of a layer with `rows` outputs and `width` inputs in 32-bit
words:

    w[n, k] = (q[k, n] - z[g, n]) * s[g, n],  g = group of input k

GPTQ packs neighbouring inputs into a word, low bits first, and numbers the groups in `g_idx` where
inputs were reordered (act-order). AWQ packs eight neighbouring outputs, in the order 0 2 4 6 1 3 5
7 from the low bits up. Zero points are packed along the outputs in the order of their convention,
and GPTQ's first version stores z - 1. Sources: the GPTQ and AWQ papers' reference packers.

awq_w4a16 stores rows of bytes, the even input in the low half, and its zero points as floats:

    w[n, k] = (q[n, k] - 8) * s[g, n] + z[g, n],  g = k / group size  (comfy-kitchen, awq_w4a16.py)

GGUF's blocks, which carry their scales, are in gguf_blocks.py.

Nothing here repacks: the words stay as the file holds them, so a memory-mapped file stays mapped,
and one layer at a time is unpacked in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import gguf_blocks

GPTQ, AWQ, W4A16, GGUF = "gptq", "awq", "awq_w4a16", "gguf"
WORD = 32
# Values unpacked at a time: bounds the working memory beyond the result to about 64 MB.
PIECE = 1 << 22


@dataclass(frozen=True)
class PackedSpec:
    """How the words of one layer are read: convention (GPTQ, AWQ, W4A16 or GGUF), bits per value,
    what is added to a stored zero point, outputs, inputs, inputs per group (unused where a g_idx is
    given), and GGUF's type of blocks.
    """

    order: str
    bits: int
    zero_offset: int
    rows: int
    width: int
    group_size: int
    blocks: str = ""

    @property
    def per_word(self) -> int:
        return WORD // self.bits

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def words_shape(self) -> tuple[int, int]:
        if self.order == GPTQ:
            return self.width // self.per_word, self.rows
        return self.width, self.rows // self.per_word


@dataclass(frozen=True)
class PackedWeight:
    """One layer: words int32 `spec.words_shape()`, scales float [groups, rows], zeros int32
    [groups, rows / values per word], g_idx int32 [width] or None, and how to read them. In W4A16
    words are int8 [rows, width / 2] and zeros are of the scales' shape and type; in GGUF words are
    uint8 [rows, bytes of a row] and all there is.
    """

    words: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    g_idx: torch.Tensor | None
    spec: PackedSpec


def dequantise(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [rows, width] in `dtype`, each value rounded once (in W4A16 to float32 first).
    Contiguous in W4A16 and GGUF, else a transposed view. Works on the device of the words.
    """
    spec, device = weight.spec, weight.words.device
    if spec.order == GGUF:
        return gguf_blocks.dequantise(weight.words, spec.blocks, dtype)
    assert weight.scales is not None and weight.zeros is not None
    if spec.order == W4A16:
        return _dequantise_rows(weight, dtype)
    zeros = zero_points(weight.zeros, spec)
    out = torch.empty(spec.width, spec.rows, dtype=dtype, device=device)
    for start, stop in _pieces(spec):
        group = _groups(weight.g_idx, spec, start, stop, device)
        values = _unpack(weight.words, spec, start, stop).sub_(zeros[group])
        # Small integer times a 16-bit float fits in float32, so only the last step rounds.
        out[start:stop] = values * weight.scales[group].float()
    return out.t()


def pack_gptq(codes: torch.Tensor, scales: torch.Tensor, spec: PackedSpec) -> PackedWeight:
    """A symmetric layer in GPTQ's packing: values q from 0 to `spec.largest` [rows, width], scales
    [groups, rows], every zero point in the middle, w = (q - middle) * scale; inputs in their order.
    """
    middle = (spec.largest + 1) // 2 - spec.zero_offset
    zeros = torch.full(scales.shape, middle, dtype=torch.int32, device=codes.device)
    words = torch.empty(spec.words_shape(), dtype=torch.int32, device=codes.device)
    for start, stop in _pieces(spec):
        _store(words, codes[:, start:stop].t().int(), spec, start, stop)
    return PackedWeight(words, scales, _pack(zeros, spec, along_rows=True), None, spec)


def _row_pieces(spec: PackedSpec) -> list[slice]:
    step = max(1, PIECE // spec.width)
    return [slice(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)]


def _dequantise_rows(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    assert weight.scales is not None and weight.zeros is not None
    spec = weight.spec
    out = torch.empty(spec.rows, spec.width, dtype=dtype, device=weight.words.device)
    for rows in _row_pieces(spec):
        words = weight.words[rows].view(torch.uint8)
        values = torch.stack((words & 15, words >> 4), dim=2).float().sub_(8)
        values = values.reshape(words.shape[0], -1, spec.group_size)
        values.mul_(weight.scales[:, rows].t().float()[:, :, None])
        values.add_(weight.zeros[:, rows].t().float()[:, :, None])
        out[rows] = values.reshape(-1, spec.width)
    return out


def requantise(weight: torch.Tensor, like: PackedWeight) -> PackedWeight:
    """Round a float weight [rows, width] to the nearest values of the same W4A16 layout as `like`:
    same groups, new scales and zero points from each group's smallest and largest value. The result
    is on the device of `weight`.
    """
    assert like.spec.order == W4A16 and like.scales is not None and like.zeros is not None
    spec, device = like.spec, weight.device
    words = torch.empty(spec.rows, spec.width // 2, dtype=torch.int8, device=device)
    scales = torch.empty(like.scales.shape, dtype=like.scales.dtype, device=device)
    zeros = torch.empty(like.zeros.shape, dtype=like.zeros.dtype, device=device)
    least = torch.finfo(like.scales.dtype).tiny
    for rows in _row_pieces(spec):
        values = weight[rows].float().reshape(-1, spec.width // spec.group_size, spec.group_size)
        low, high = values.amin(dim=2), values.amax(dim=2)
        scale = ((high - low) / spec.largest).clamp_(min=least).to(scales.dtype)
        zero = (low + 8 * scale.float()).to(zeros.dtype)
        # Against the scale and zero point as they are stored, so that their rounding counts.
        steps = (values - zero.float()[:, :, None]) / scale.float()[:, :, None]
        whole = steps.round_().add_(8).clamp_(0, spec.largest).to(torch.uint8)
        halves = whole.reshape(-1, spec.width // 2, 2)
        words[rows] = (halves[:, :, 0] | halves[:, :, 1] << 4).view(torch.int8)
        scales[:, rows], zeros[:, rows] = scale.t(), zero.t()
    return PackedWeight(words, scales, zeros, None, spec)


def zero_points(zeros: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    """The true zero points, int32 [groups, rows], from their packed form."""
    return stored_zero_points(zeros, spec).add_(spec.zero_offset)


def stored_zero_points(zeros: torch.Tensor, spec: PackedSpec) -> torch.Tensor:
    """The zero points as they are stored, int32 [groups, rows], before the offset."""
    values = (zeros[:, :, None] >> _shifts(spec, zeros.device)) & spec.largest
    return values.reshape(zeros.shape[0], spec.rows)


def _pieces(spec: PackedSpec) -> list[tuple[int, int]]:
    step = max(1, PIECE // spec.rows // spec.per_word) * spec.per_word
    return [(start, min(start + step, spec.width)) for start in range(0, spec.width, step)]


def _groups(
    g_idx: torch.Tensor | None, spec: PackedSpec, start: int, stop: int, device: torch.device
) -> torch.Tensor:
    if g_idx is not None:
        return g_idx[start:stop].long()
    inputs = torch.arange(start, stop, device=device)
    return torch.div(inputs, spec.group_size, rounding_mode="floor")


def _shifts(spec: PackedSpec, device: torch.device) -> torch.Tensor:
    # Counted on the device: numbers copied to it would make the host wait, for each piece again.
    places = torch.arange(0, WORD, spec.bits, dtype=torch.int32, device=device)
    # AWQ: output 0..7 lie at 0 4 1 5 2 6 3 7, counted from the low bits up.
    return places.view(2, -1).t().reshape(-1) if spec.order == AWQ else places


def _unpack(words: torch.Tensor, spec: PackedSpec, start: int, stop: int) -> torch.Tensor:
    """Values int32 [stop - start, rows] of the given inputs."""
    shifts = _shifts(spec, words.device)
    if spec.order == GPTQ:
        part = words[start // spec.per_word : stop // spec.per_word]
        values = (part[:, None, :] >> shifts[None, :, None]) & spec.largest
    else:
        values = (words[start:stop, :, None] >> shifts) & spec.largest
    return values.reshape(stop - start, spec.rows)


def _pack(values: torch.Tensor, spec: PackedSpec, along_rows: bool) -> torch.Tensor:
    """Words int32 from int32 values [n, rows], packed along the last axis or the first."""
    shifts = _shifts(spec, values.device).long()
    count = spec.per_word
    if along_rows:
        parts = values.long().reshape(values.shape[0], -1, count) << shifts
        words = parts.sum(dim=2)
    else:
        parts = values.long().reshape(-1, count, values.shape[1]) << shifts[None, :, None]
        words = parts.sum(dim=1)
    # The top value reaches the sign bit of a 32-bit word.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _store(
    words: torch.Tensor, values: torch.Tensor, spec: PackedSpec, start: int, stop: int
) -> None:
    if spec.order == GPTQ:
        words[start // spec.per_word : stop // spec.per_word] = _pack(values, spec, False)
    else:
        words[start:stop] = _pack(values, spec, True)
