"""Carries out a plan: canonical names, one spelling of the scales, and the format declaration
that ComfyUI reads.

Weights are passed on as they are, memory-mapped and perhaps read-only; only tensors that must
change (scales, and small parameters stored as fp8) are copied, never changed in place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..errors import FrugalError
from .layouts import FLOAT8, NVFP4
from .plan import Plan

E5M2, E4M3 = "float8_e5m2", "float8_e4m3fn"


def normalise(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict under canonical names, from the tensors of the planned file under their own
    names.

    fp8 and int8 scales come out as float32, shape [] or [rows, 1] (int8 per row: as stored);
    parameters that are no linear weights and are stored as fp8 come out as bfloat16, which holds
    every fp8 value. Raises FrugalError for a scale that is not finite and for a tensor that is
    not there.
    """
    out: dict[str, torch.Tensor] = {}
    for raw, name in plan.rename.items():
        if raw not in tensors:
            raise FrugalError(
                f"{plan.file} no longer holds {raw}", "the file as it was planned", "load it again"
            )
        tensor = tensors[raw]
        layer, _, leaf = name.rpartition(".")
        layout = plan.layers.get(layer)
        if layout is None or leaf in ("weight", "bias"):
            quantised = layout is not None and leaf == "weight"
            out[name] = (
                tensor if quantised or tensor.dtype not in FLOAT8 else tensor.to(torch.bfloat16)
            )
        elif layout.format in FLOAT8.values():
            if leaf == "weight_scale":
                out[name] = _scale(plan.file, name, tensor).reshape(
                    (-1, 1) if layout.per_row else ()
                )
        elif (
            leaf == "weight_scale" and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        ):
            scale = _scale(plan.file, name, tensor)
            out[name] = scale.reshape(()) if scale.numel() == 1 else scale
        elif layout.format == NVFP4 and leaf == "weight_scale_2":
            out[name] = _scale(plan.file, name, tensor).reshape(())
        else:
            out[name] = tensor
    for layer, layout in plan.layers.items():
        if layout.unit_scale:
            out[f"{layer}.weight_scale"] = torch.ones((), dtype=torch.float32)
    return out


def _scale(file: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    scale = tensor.to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).sum())
        raise FrugalError(
            f"{file}: {name} holds {bad} values that are not finite",
            "finite scales",
            "download the file again",
        )
    return scale


def declaration(plan: Plan, known: Collection[str], full_precision: bool) -> dict[str, Any]:
    """The content of `_quantization_metadata` for the planned layers; empty if none is quantised.

    `known` are the format names of the running ComfyUI. fp8 layers always ask for full-precision
    products; `full_precision` asks for it in every layer. Raises FrugalError for a format that
    ComfyUI does not know.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, layout in plan.layers.items():
        form = layout.format
        if form == E5M2 and form not in known:
            # Where only one fp8 format is known, its reader takes the type from the bytes.
            form = E4M3
        if form not in known:
            count = sum(layer.format == layout.format for layer in plan.layers.values())
            raise FrugalError(
                f"{plan.file} holds {count} layers in {layout.format} (first {name}), "
                "unknown to this ComfyUI",
                f"one of {', '.join(sorted(known)) or 'no quantised format'}",
                "update ComfyUI and comfy-kitchen, or use an fp8 file of the same model",
            )
        entry = {"format": form, **layout.options}
        if full_precision or form in FLOAT8.values():
            entry["full_precision_matrix_mult"] = True
        layers[name] = entry
    return (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        if layers
        else {}
    )
