"""Weights into the tensors of a format and back.

W4A8 is comfy-kitchen's arithmetic, and so is decoding int8; awq_w4a16 has a decoder there and no
quantiser, so both are here: W = (q - 8) * scale + zero with q from 0 to 15, even inputs in the low
half byte.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import FrugalError
from . import per_channel
from .table import (
    AWQ,
    BF16,
    DECLARATION,
    FP8,
    INT8,
    chosen_options,
    declaration,
    half,
    tensor_specs,
)

# Values turned to float32 at a time: bounds the working memory of a layer.
PIECE = 1 << 22
# A codebook serves a whole weight and is chosen from about this many values, evenly spread rows.
CODEBOOK_SAMPLE = 1 << 22


def encode(
    target: str,
    weight: torch.Tensor,
    device: torch.device | str,
    options: Mapping[str, Any] | None = None,
    statistics: Any = None,
    *,
    where: str = "the model",
) -> dict[str, torch.Tensor]:
    """The tensors of `tensor_specs` for a float weight [out, in], on the CPU, computed on `device`.

    Without `statistics` every value is rounded to the nearest one of the grid; with the statistics
    of the layer's inputs the codes are solved by GPTQ (4 bits: `gptq.solve`) or the scales searched
    (8 bits: `clip.solve`).
    `where` ("file: layer") names the weight in errors. Raises FrugalError for a weight that is not
    finite, a width that does not suit, and where comfy-kitchen lacks the format.
    """
    shape = (weight.shape[0], weight.shape[1])
    chosen = chosen_options(target, shape, options)
    if statistics is not None and target != BF16:
        made = _solver(target)(target, weight, statistics, device)
    else:
        maker = {BF16: _bf16, FP8: _fp8, INT8: _int8, AWQ: _awq}.get(target, _w4a8)
        made = maker(weight, torch.device(device), chosen, where)
    if chosen:
        made[DECLARATION] = declaration(target, shape, options)
    return {
        suffix: made[suffix].cpu() for suffix in tensor_specs(target, shape, options, weight.dtype)
    }


def _solver(target: str) -> Callable[..., dict[str, torch.Tensor]]:
    # The solvers are built on this module.
    from ..quantize import clip, gptq

    return clip.solve if target in (FP8, INT8) else gptq.solve


def pieces(
    weight: torch.Tensor, device: torch.device, where: str
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a weight [out, in] as float32 on `device`, about PIECE values at a time; raises
    FrugalError for a value that is not finite.
    """
    rows = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows].to(device=device, dtype=torch.float32)
        if not bool(torch.isfinite(piece).all()):
            raise FrugalError(
                f"{where} holds a weight that is not finite",
                "finite weights",
                "download the model again",
            )
        yield slice(start, start + piece.shape[0]), piece


def _bf16(
    weight: torch.Tensor, device: torch.device, chosen: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    out = torch.empty(weight.shape, dtype=half(weight.dtype))
    for rows, piece in pieces(weight, device, where):
        out[rows] = piece.to(out.dtype).cpu()
        if not bool(torch.isfinite(out[rows]).all()):
            raise FrugalError(
                f"{where} holds a weight beyond {str(out.dtype).removeprefix('torch.')}",
                "weights that fit",
                f"choose {FP8}, or a source in bf16 or fp32",
            )
    return {"weight": out}


def _fp8(
    weight: torch.Tensor, device: torch.device, chosen: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    tops = [piece.abs().amax() for _, piece in pieces(weight, device, where)]
    scale = torch.stack(tops).amax() / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for rows, piece in pieces(weight, device, where):
        out[rows] = (piece / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn).cpu()
    return {"weight": out, "weight_scale": scale.reshape(())}


def _int8(
    weight: torch.Tensor, device: torch.device, chosen: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    # Our own rotation: comfy-kitchen's is a matmul, whose last bits depend on CPU and shape.
    group = chosen["convrot_groupsize"]
    q, scale = per_channel.encode(
        weight, per_channel.INT8, rotation=group, device=device, where=where
    )
    return {"weight": q, "weight_scale": scale}


def _w4a8(
    weight: torch.Tensor, device: torch.device, chosen: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    settings = {key: chosen[key] for key in ("group_size", "convrot_groupsize")}
    form, (out, inside) = kitchen("AsymW4A8Int8Layout"), weight.shape
    sample = weight
    limit = max(1, CODEBOOK_SAMPLE // inside)
    if out > limit:
        sample = weight[torch.linspace(0, out - 1, limit).long().to(weight.device)]
    _, params = form.quantize(sample.to(device=device, dtype=torch.float32), **settings)
    codebook = params.codebook
    made = {
        "weight": torch.empty(out, inside // 2, dtype=torch.int8),
        "weight_s_rel": torch.empty(out, inside // chosen["group_size"], dtype=torch.float8_e4m3fn),
        "weight_s_channel": torch.empty(out, dtype=torch.float32),
    }
    for rows, piece in pieces(weight, device, where):
        data, params = form.quantize(piece, codebook_tensor=codebook, **settings)
        made["weight"][rows] = data.cpu()
        made["weight_s_rel"][rows] = params.scale.cpu()
        made["weight_s_channel"][rows] = params.s_channel.cpu()
    return made | {"weight_codebook": codebook.float()}


def _awq(
    weight: torch.Tensor, device: torch.device, chosen: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    group, kind = chosen["group_size"], half(weight.dtype)
    out, inside = weight.shape
    codes = torch.empty(out, inside // 2, dtype=torch.int8)
    scales = torch.empty(inside // group, out, dtype=kind)
    zeros = torch.empty_like(scales)
    for rows, piece in pieces(weight, device, where):
        grouped = piece.reshape(piece.shape[0], -1, group)
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        # Codes are chosen against the scale and zero that a reader will see, after their rounding.
        scale = ((high - low) / 15).to(kind)
        zero = (low + 8 * scale.float()).to(kind)
        step = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        q = ((grouped - zero.float()[..., None]) / step[..., None]).round_().add_(8).clamp_(0, 15)
        codes[rows] = pack_nibbles(q.reshape(piece.shape).to(torch.uint8)).cpu()
        scales[:, rows], zeros[:, rows] = scale.t().cpu(), zero.t().cpu()
    return {"weight": codes, "weight_scale": scales, "weight_zeros": zeros}


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in / 2] from uint8 codes 0..15 [out, in], even inputs in the low half byte."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [out, in] from int8 [out, in / 2]; the inverse of pack_nibbles."""
    raw = packed.contiguous().view(torch.uint8)
    return torch.stack((raw & 15, raw >> 4), dim=2).reshape(raw.shape[0], -1)


def decode(
    target: str,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight [out, in] in `dtype` that the stored tensors stand for, unrotated, on their
    device; one piece of rows at a time, the tensors stay as they are.

    Raises FrugalError where comfy-kitchen lacks the format.
    """
    chosen = chosen_options(target, shape, options)
    out = torch.empty(shape, dtype=dtype, device=tensors["weight"].device)
    rows = max(1, PIECE // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        out[part] = _decode_rows(target, tensors, chosen, part, shape[1]).to(dtype)
    return out


def _decode_rows(
    target: str,
    tensors: Mapping[str, torch.Tensor],
    chosen: Mapping[str, Any],
    rows: slice,
    inside: int,
) -> torch.Tensor:
    weight = tensors["weight"][rows]
    common = {"orig_dtype": torch.float32, "orig_shape": (weight.shape[0], inside)}
    if target == BF16:
        return weight.float()
    if target == FP8:
        return weight.float() * tensors["weight_scale"].float()
    if target == INT8:
        form = kitchen("TensorWiseINT8Layout")
        settings = {key: chosen[key] for key in ("convrot", "convrot_groupsize")}
        params = form.Params(scale=tensors["weight_scale"][rows], **settings, **common)
        return form.dequantize(weight, params)
    if target == AWQ:
        scale = tensors["weight_scale"][:, rows].t().float()
        zero = tensors["weight_zeros"][:, rows].t().float()
        codes = unpack_nibbles(weight).float().sub_(8)
        grouped = codes.reshape(weight.shape[0], scale.shape[1], -1)
        return (grouped * scale[..., None] + zero[..., None]).reshape(weight.shape[0], inside)
    form = kitchen("AsymW4A8Int8Layout")
    params = form.Params(
        scale=tensors["weight_s_rel"][rows],
        s_channel=tensors["weight_s_channel"][rows],
        codebook=tensors.get("weight_codebook"),
        **{key: chosen[key] for key in ("group_size", "convrot_groupsize")},
        **common,
    )
    return form.dequantize(weight, params)


def kitchen(name: str) -> Any:
    """A layout class of comfy-kitchen by its name; FrugalError if it is not there."""
    try:
        return getattr(importlib.import_module("comfy_kitchen.tensor"), name)
    except (ImportError, AttributeError) as error:
        raise FrugalError(
            f"comfy-kitchen has no {name}", "a comfy-kitchen with this format", "update ComfyUI"
        ) from error
