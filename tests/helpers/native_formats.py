"""Layers in ComfyUI's declared formats, from comfy-kitchen's own quantisers."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch

TURN = {"convrot_groupsize": 256}
# label -> (format, layout of comfy-kitchen, arguments of its quantiser, declared options)
NATIVE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "int8, one scale": ("int8_tensorwise", "TensorWiseINT8Layout", {}, {}),
    "int8, scale per row": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True},
        {},
    ),
    "int8 ConvRot": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, **TURN},
        {"convrot": True, **TURN},
    ),
    "W4A4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", TURN, TURN),
    "W4A8, groups of 16": (
        "asym_w4a8_int8",
        "AsymW4A8Int8Layout",
        {"group_size": 16, **TURN},
        {"group_size": 16, **TURN},
    ),
    "W4A8, groups of 64": (
        "asym_w4a8_int8",
        "AsymW4A8Int8Layout",
        {"group_size": 64, **TURN},
        {"group_size": 64, **TURN},
    ),
    "NVFP4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
    "MXFP8": ("mxfp8", "TensorCoreMXFP8Layout", {}, {}),
}
# What rounding activations inside the kernel may cost, where it is more than the order of sums.
TOLERANCE = {"int8": 3e-2, "W4A8": 3e-2, "W4A4": 0.2}


def tolerance(label: str) -> float:
    """||out - exact|| / ||exact|| that a correct loader may have on the CPU."""
    return next((most for name, most in TOLERANCE.items() if name in label), 2e-3)


def native_layer(
    label: str, weight: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """(tensors by suffix, dequantised float32 [out, in], declaration) of a float weight."""
    form, layout, arguments, options = NATIVE[label]
    kind = getattr(importlib.import_module("comfy_kitchen.tensor"), layout)
    data, params = kind.quantize(weight, **arguments)
    held = {
        f"weight{suffix}": tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu
        else tensor
        for suffix, tensor in kind.state_dict_tensors(data, params).items()
    }  # fmt: skip
    return held, kind.dequantize(data, params).float(), {"format": form, **options}


def native_file(label: str, source: dict[str, torch.Tensor], layers: list[str], header: bool):
    """(tensors, metadata, meaning) of a bf16 file with `layers` in a declared format, said in the
    header or beside each layer.
    """
    held = {name: tensor.bfloat16() for name, tensor in source.items()}
    meant = {name: tensor.float() for name, tensor in held.items()}
    declared = {}
    for layer in layers:
        tensors, meant[f"{layer}.weight"], entry = native_layer(label, source[f"{layer}.weight"])
        held |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
        declared[layer] = entry
        if not header:
            raw = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
            held[f"{layer}.comfy_quant"] = raw
    text = json.dumps({"format_version": "1.0", "layers": declared})
    return held, {"_quantization_metadata": text} if header else {}, meant
