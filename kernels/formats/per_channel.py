"""Weights in 8 bits with one scale per output channel, for matrices and convolution kernels alike.

w = q * s: q int8 or float8 e4m3 of the weight's own shape [out, ...], s float32 [out, 1, ...] or
one for the whole tensor. Matrices may be rotated first: groups of inputs times the normalised
regular Hadamard matrix of ConvRot, which is symmetric and its own inverse, so that decoding rotates
back. A weight that was decoded, changed and encoded again needs stochastic rounding: changes below
half a step, such as a LoRA's, would vanish otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import FrugalError
from .rotation import rotate, rotate_by_matmul

INT8, FP8 = "int8", "fp8"
TYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn}
LARGEST = {INT8: 127.0, FP8: 448.0}
# Sizes of ConvRot's matrix that are tried on a width; powers of 4 by construction.
ROTATIONS = (64, 16)
# Values turned to float32 at a time: bounds the working memory of a layer.
PIECE = 1 << 22
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Spacing of e4m3 numbers below its smallest normal one, and bits of its mantissa.
FP8_LEAST, FP8_MANTISSA = 2.0**-9, 3


def rotation_for(width: int) -> int:
    """Group size for `width` inputs, 0 where none divides it."""
    return next((size for size in ROTATIONS if width % size == 0), 0)


def encode(
    weight: torch.Tensor,
    kind: str,
    *,
    rotation: int = 0,
    per_tensor: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
    where: str = "the model",
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, s) of a float weight [out, ...]; s is [out, 1, ...], or [] with `per_tensor`.

    Rounded to the nearest value, or stochastically with a `seed`. Computed in float32 on `device`
    (the weight's own by default), PIECE values at a time; both results lie on the weight's device.
    `where` names the weight in errors: FrugalError for one that is not of floats or, with `check`,
    not finite. Without, such a row decodes to NaN, and the host waits for nothing.
    """
    if weight.dtype not in FLOATS:
        raise FrugalError(
            f"{where} holds weights in {str(weight.dtype).removeprefix('torch.')}",
            f"fp32, fp16 or bf16 weights to quantise to {kind}",
            "use an unquantised file of the same model",
        )
    place = torch.device(device) if device is not None else weight.device
    chance = None if seed is None else torch.Generator(device=place).manual_seed(seed)
    q = torch.empty(weight.shape, dtype=TYPES[kind], device=weight.device)
    s = torch.empty((weight.shape[0], *[1] * (weight.ndim - 1)), device=weight.device)
    whole, finite = None, []
    if per_tensor:
        tops = [piece.abs().amax() for _, piece in _pieces(weight, place, rotation)]
        whole = (torch.stack(tops).amax() / LARGEST[kind]).clamp_(min=1e-30)
    for rows, piece in _pieces(weight, place, rotation):
        if check:
            finite.append(torch.isfinite(piece).all())
        top = piece.flatten(1).abs().amax(dim=1) / LARGEST[kind]
        scale = top.clamp_(min=1e-30).reshape(-1, *[1] * (piece.ndim - 1))
        scale = scale if whole is None else whole
        q[rows] = _round(piece.div_(scale), kind, chance).to(weight.device)
        s[rows] = scale.to(weight.device)
    if finite and not bool(torch.stack(finite).all()):
        raise FrugalError(
            f"{where} holds a weight that is not finite",
            "finite weights",
            "download the model again",
        )
    return q, s if whole is None else whole.reshape(()).to(weight.device)


def decode(q: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, rotation: int = 0) -> torch.Tensor:
    """The weight that (q, s) stand for, in `dtype`, on their device."""
    if rotation:
        return rotate_by_matmul(q.to(torch.float32).mul_(s), rotation).to(dtype)
    return q.to(dtype).mul_(s)


def _pieces(
    weight: torch.Tensor, device: torch.device, rotation: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    rows = max(1, PIECE * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, min(start + rows, weight.shape[0]))
        # A copy always: what is yielded is written to.
        piece = weight[part].to(device=device, dtype=torch.float32, copy=True)
        yield part, rotate(piece, rotation) if rotation else piece


def _round(values: torch.Tensor, kind: str, chance: torch.Generator | None) -> torch.Tensor:
    """Scaled float32 values as q; they are overwritten."""
    limit = LARGEST[kind]
    if chance is None:
        values = values.round_() if kind == INT8 else values
    else:
        step = torch.ones_like(values)
        if kind == FP8:
            # The spacing of e4m3 around each value: 2^(exponent - mantissa bits).
            exponent = torch.frexp(values).exponent - 1 - FP8_MANTISSA
            step = torch.ldexp(step, exponent).clamp_(min=FP8_LEAST)
        lift = torch.rand(values.shape, generator=chance, device=values.device)
        values = values.div_(step).add_(lift).floor_().mul_(step)
    return values.clamp_(-limit, limit).to(TYPES[kind])
