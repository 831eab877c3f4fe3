"""The formats a weight can be written in: ComfyUI's own, as tensors beside a weight and a
declaration, with their exact sizes.

| target | format in the file | stored for a weight [out, in] |
|---|---|---|
| bf16 | none | 16-bit floats as they are; float32 rounded to bfloat16 |
| fp8 | float8_e4m3fn | 1 byte each, one float32 scale |
| int8 ConvRot | int8_tensorwise | 1 byte each, one float32 scale per row, rows rotated |
| W4A8, W4A8 g64 | asym_w4a8_int8 | 4 bits each, an e4m3 scale per 16 or 64 inputs, rows rotated |
| AWQ W4A16 | awq_w4a16 | 4 bits each, a 16-bit scale and zero per 64 inputs |

ConvRot multiplies groups of inputs by a normalised Hadamard matrix before rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
TensorSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


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


def tensor_specs(
    target: str,
    shape: tuple[int, ...],
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> TensorSpecs:
    """Every tensor stored for a weight of `shape` [out, in]: name beside the layer -> (dtype,
    shape), in the order in which they are written (wide types first, which keeps them aligned).

    `dtype` is that of the unquantised weight: fp16 stays fp16 in bf16 and in the scales of AWQ, any
    other float becomes bf16. The declaration, padded with spaces, ends at a multiple of 8 bytes.
    """
    chosen = chosen_options(target, shape, options)
    held = _float_specs(target, shape, chosen, dtype)
    if chosen:
        taken = sum(math.prod(size) * kind.itemsize for kind, size in held.values())
        held[DECLARATION] = (torch.uint8, (len(declaration_bytes(chosen, taken)),))
    return held


def _float_specs(
    target: str, shape: tuple[int, ...], chosen: Mapping[str, Any], dtype: torch.dtype
) -> TensorSpecs:
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
    return sum(
        math.prod(size) * kind.itemsize for kind, size in tensor_specs(target, shape).values()
    )


def half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which floats of `dtype` are kept."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def declaration(
    target: str, shape: tuple[int, ...], options: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """The comfy_quant tensor, uint8 [bytes of JSON]; `target` must not be bf16."""
    chosen = chosen_options(target, shape, options)
    held = _float_specs(target, shape, chosen, torch.bfloat16)
    taken = sum(math.prod(size) * kind.itemsize for kind, size in held.values())
    return torch.tensor(list(declaration_bytes(chosen, taken)), dtype=torch.uint8)


def declaration_bytes(chosen: Mapping[str, Any], taken: int) -> bytes:
    """The JSON of a declaration, padded with spaces so that it ends at a multiple of 8 bytes when
    it follows `taken` bytes.
    """
    text = json.dumps(dict(chosen)).encode("ascii")
    return text + b" " * (-(taken + len(text)) % 8)


def chosen_options(
    target: str, shape: tuple[int, ...], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`options` with what is given in place of its settings. Raises FrugalError for others."""
    made = options(target, shape)
    if given and {key: value for key, value in given.items() if key in made} != dict(given):
        raise FrugalError(
            f"settings {sorted(given)} for {target}",
            f"settings among {sorted(made)}",
            "leave the settings out",
        )
    return made | dict(given or {})


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise FrugalError(
            f"the format {ascii(target)[:40]}",
            f"one of {', '.join(TARGETS)}",
            "choose one of these",
        )
