"""The formats a weight can be written in: ComfyUI's own, as tensors beside a weight and a
declaration, with their exact sizes.

| target | format in the file | stored for a weight [out, in] |
|---|---|---|
| bf16 | none | 16-bit floats as they are; float32 rounded to bfloat16 |
| fp8 | float8_e4m3fn | 1 byte each, one float32 scale |
| int8 ConvRot | int8_tensorwise | 1 byte each, one float32 scale per row, rows rotated |
| W4A8, W4A8 g64 | asym_w4a8_int8 | 4 bits each, an e4m3 scale per 16 or 64 inputs, rows rotated |
| AWQ W4A16 | awq_w4a16 | 4 bits each, a 16-bit scale and zero per 64 inputs |

ConvRot multiplies groups of inputs by a normalised Hadamard matrix before rounding. The arithmetic
of the rotated formats is comfy-kitchen's; awq_w4a16 has a decoder there and no quantiser, so both
are here: W = (q - 8) * scale + zero with q from 0 to 15, even inputs in the low half byte.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import FrugalError

BF16, FP8, INT8, W4A8, W4A8_G64, AWQ = (
    "bf16",
    "fp8",
    "int8 ConvRot",
    "W4A8",
    "W4A8 g64",
    "AWQ W4A16",
)
TARGETS: tuple[str, ...] = (BF16, FP8, INT8, W4A8, W4A8_G64, AWQ)
FORMATS: Mapping[str, str] = {
    FP8: "float8_e4m3fn",
    INT8: "int8_tensorwise",
    W4A8: "asym_w4a8_int8",
    W4A8_G64: "asym_w4a8_int8",
    AWQ: "awq_w4a16",
}
DECLARATION = "comfy_quant"
SCALE_GROUP = {W4A8: 16, W4A8_G64: 64, AWQ: 64}
ROTATION_GROUPS = (256, 64, 16)
# Values turned to float32 at a time: bounds the working memory of a layer.
PIECE = 1 << 22
# A codebook serves a whole weight and is chosen from about this many values, evenly spread rows.
CODEBOOK_SAMPLE = 1 << 22
Leaves = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def suits(target: str, shape: tuple[int, ...]) -> str | None:
    """None if a weight of `shape` [out, in] can be held in `target`, else the reason why not."""
    _check_target(target)
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions, not 2"
    if target in (BF16, FP8):
        return None
    multiple = max(SCALE_GROUP.get(target, 16), 16)
    if shape[1] % multiple or not shape[1]:
        return f"it has {shape[1]} inputs, no multiple of {multiple}"
    return None


def options(target: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The declaration of a weight of `shape` [out, in] in `target`, as it stands in comfy_quant:
    "format" and its settings; empty for bf16. Raises FrugalError where the width does not suit.
    """
    reason = suits(target, shape)
    if reason:
        raise FrugalError(
            f"a weight of shape {list(shape)} as {target}: {reason}",
            "a width that suits the format",
            f"choose {FP8}",
        )
    if target == BF16:
        return {}
    made: dict[str, Any] = {"format": FORMATS[target]}
    if target == FP8:
        # Wan loses by fp8 products with a fixed activation scale; weights alone are stored in fp8.
        return made | {"full_precision_matrix_mult": True}
    if target == AWQ:
        return made | {"group_size": SCALE_GROUP[AWQ]}
    rotation = next(size for size in ROTATION_GROUPS if shape[1] % size == 0)
    if target == INT8:
        return made | {"convrot": True, "convrot_groupsize": rotation}
    return made | {"group_size": SCALE_GROUP[target], "convrot_groupsize": rotation}


def leaves(
    target: str,
    shape: tuple[int, ...],
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Leaves:
    """Every tensor stored for a weight of `shape` [out, in]: name beside the layer -> (dtype,
    shape), in the order in which they are written (wide types first, which keeps them aligned).

    `dtype` is that of the unquantised weight: fp16 stays fp16 in bf16 and in the scales of AWQ, any
    other float becomes bf16. The declaration, padded with spaces, ends at a multiple of 8 bytes.
    """
    chosen = _options(target, shape, options)
    held = _float_leaves(target, shape, chosen, dtype)
    if chosen:
        taken = sum(math.prod(size) * kind.itemsize for kind, size in held.values())
        held[DECLARATION] = (torch.uint8, (len(declaration_bytes(chosen, taken)),))
    return held


def _float_leaves(
    target: str, shape: tuple[int, ...], chosen: Mapping[str, Any], dtype: torch.dtype
) -> Leaves:
    out, inside = shape
    one = torch.float32
    if target == BF16:
        return {"weight": (half(dtype), (out, inside))}
    if target == FP8:
        return {"weight_scale": (one, ()), "weight": (torch.float8_e4m3fn, (out, inside))}
    if target == INT8:
        return {"weight_scale": (one, (out, 1)), "weight": (torch.int8, (out, inside))}
    groups = inside // chosen["group_size"]
    codes = (torch.int8, (out, inside // 2))
    if target == AWQ:
        scale = (half(dtype), (groups, out))
        return {"weight_scale": scale, "weight_zeros": scale, "weight": codes}
    return {
        "weight_s_channel": (one, (out,)),
        "weight_codebook": (one, (16,)),
        "weight": codes,
        "weight_s_rel": (torch.float8_e4m3fn, (out, groups)),
    }


def stored_bytes(target: str, shape: tuple[int, ...]) -> int:
    """Bytes a weight of `shape` [out, in] takes in the file, scales and declaration included."""
    return sum(math.prod(size) * kind.itemsize for kind, size in leaves(target, shape).values())


def half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which floats of `dtype` are kept."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def declaration(
    target: str, shape: tuple[int, ...], options: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """The comfy_quant tensor, uint8 [bytes of JSON]; `target` must not be bf16."""
    chosen = _options(target, shape, options)
    held = _float_leaves(target, shape, chosen, torch.bfloat16)
    taken = sum(math.prod(size) * kind.itemsize for kind, size in held.values())
    return torch.tensor(list(declaration_bytes(chosen, taken)), dtype=torch.uint8)


def declaration_bytes(chosen: Mapping[str, Any], taken: int) -> bytes:
    """The JSON of a declaration, padded with spaces so that it ends at a multiple of 8 bytes when
    it follows `taken` bytes.
    """
    text = json.dumps(dict(chosen)).encode("ascii")
    return text + b" " * (-(taken + len(text)) % 8)


def _options(
    target: str, shape: tuple[int, ...], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    made = options(target, shape)
    if given and {key: value for key, value in given.items() if key in made} != dict(given):
        raise FrugalError(
            f"settings {sorted(given)} for {target}",
            f"settings among {sorted(made)}",
            "leave the settings out",
        )
    return made | dict(given or {})


def encode(
    target: str,
    weight: torch.Tensor,
    device: torch.device | str,
    options: Mapping[str, Any] | None = None,
    statistics: Any = None,
    *,
    where: str = "the model",
) -> dict[str, torch.Tensor]:
    """The tensors of `leaves` for a float weight [out, in], on the CPU, computed on `device`.

    Without `statistics` every value is rounded to the nearest one of the grid; with the statistics
    of the layer's inputs the codes are solved by GPTQ (4 bits: `gptq.solve`) or the scales searched
    (8 bits: `clip.solve`).
    `where` ("file: layer") names the weight in errors. Raises FrugalError for a weight that is not
    finite, a width that does not suit, and where comfy-kitchen lacks the format.
    """
    shape = (weight.shape[0], weight.shape[1])
    chosen = _options(target, shape, options)
    if statistics is not None and target != BF16:
        made = _solver(target)(target, weight, statistics, device)
    else:
        maker = {BF16: _bf16, FP8: _fp8, INT8: _int8, AWQ: _awq}.get(target, _w4a8)
        made = maker(weight, torch.device(device), chosen, where)
    if chosen:
        made[DECLARATION] = declaration(target, shape, options)
    return {leaf: made[leaf].cpu() for leaf in leaves(target, shape, options, weight.dtype)}


def _solver(target: str) -> Callable[..., dict[str, torch.Tensor]]:
    # The solvers are built on this module.
    from . import clip, gptq

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
                f"{where} holds a weight that is not finite", "finite weights", "download it again"
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
    # Rows are independent, so pieces give what the whole would; float32 keeps the rotation exact.
    form, group = kitchen("TensorWiseINT8Layout"), chosen["convrot_groupsize"]
    out = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32)
    for rows, piece in pieces(weight, device, where):
        data, params = form.quantize(piece, per_channel=True, convrot=True, convrot_groupsize=group)
        out[rows], scales[rows] = data.cpu(), params.scale.reshape(-1, 1).cpu()
    return {"weight": out, "weight_scale": scales}


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
    chosen = _options(target, shape, options)
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


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise FrugalError(
            f"the format {ascii(target)[:40]}",
            f"one of {', '.join(TARGETS)}",
            "choose one of these",
        )
