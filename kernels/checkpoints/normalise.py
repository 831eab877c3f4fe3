"""Carries out a plan: canonical names, one spelling of the scales, and the format declaration
that ComfyUI reads.

Weights are passed on as they are, memory-mapped and perhaps read-only; only tensors that must
change (scales, and small parameters stored as fp8) are copied, never changed in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..errors import FrugalError
from ..formats.packed_int import W4A16, PackedWeight
from .layouts import BLOCK, FLOAT8, MXFP8, NVFP4, W4A4, LayerLayout
from .packed import check_packed, from_lightx2v
from .resolve import Plan

E5M2, E4M3 = "float8_e5m2", "float8_e4m3fn"
Quantise = Callable[[torch.Tensor, LayerLayout], Mapping[str, torch.Tensor]]


def normalise(
    plan: Plan, tensors: Mapping[str, torch.Tensor], quantise: Quantise | None = None
) -> dict[str, torch.Tensor]:
    """The state dict under canonical names, from the planned file's tensors under their own names.

    Scales of fp8 and int8 come out as float32, shape [], [rows, 1] or a grid of blocks; parameters
    that are no linear weights and are stored as fp8 come out as bfloat16, which holds every fp8
    value; GPTQ, AWQ and GGUF layers come out packed, to be taken out with `take_packed`. `quantise`
    turns the float weight of a layer to be quantised on load into its tensors, suffix -> tensor.
    Raises FrugalError for a scale that is not finite and for a tensor that is not there.
    """
    out: dict[str, torch.Tensor] = {}
    for raw, name in plan.rename.items():
        if raw not in tensors:
            raise FrugalError(
                f"{plan.file} no longer holds {raw}",
                "the file as it was planned",
                "load the model again",
            )
        layer, _, suffix = name.rpartition(".")
        layout = plan.layers.get(layer)
        if layout is not None and layout.computed and suffix == "weight":
            assert quantise is not None, "a plan that quantises needs a quantiser"
            made = quantise(tensors[raw], layout)
            out.update({f"{layer}.{part}": value for part, value in made.items()})
        elif layout is None or suffix in ("weight", "bias"):
            stays = layout is not None and suffix == "weight"
            out[name] = tensors[raw] if stays else _without_float8(tensors[raw])
        elif suffix != "input_scale" or layout.format not in FLOAT8.values():
            out[name] = _side_tensor(plan.file, name, layout, tensors[raw])
    for layer, layout in plan.layers.items():
        if layout.unit_scale:
            out[f"{layer}.weight_scale"] = torch.ones((), dtype=torch.float32)
        if layout.lightx2v:
            parts = {suffix: out.pop(f"{layer}.{suffix}") for suffix in ("weight", *layout.stored)}
            made = from_lightx2v(f"{plan.file}: {layer}", parts)
            out.update({f"{layer}.{suffix}": value for suffix, value in made.items()})
    return out


def take_packed(plan: Plan, state_dict: dict[str, torch.Tensor]) -> dict[str, PackedWeight]:
    """Take the layers that the pack runs (GPTQ, AWQ, GGUF, W4A16) out of a normalised state dict
    (which changes): layer -> weight.

    In their place the state dict gets one fp8 element seen as the whole weight and a scale of one,
    so that a loader which knows fp8 builds the layer without memory for it. Raises FrugalError for
    ambiguous or meaningless values.
    """
    taken: dict[str, PackedWeight] = {}
    for name in plan.packed:
        layout = plan.layers[name]
        assert layout.packed is not None
        parts = {
            suffix: state_dict.pop(f"{name}.{suffix}")
            for suffix in ("weight", *layout.stored.values())
        }
        weight = PackedWeight(
            parts["weight"],
            parts.get("weight_scale"),
            parts.get("weight_zeros"),
            parts.get("weight_g_idx"),
            layout.packed,
        )
        check_packed(f"{plan.file}: {name}", weight, plan.settings)
        shape = (layout.packed.rows, layout.packed.width)
        state_dict[f"{name}.weight"] = torch.zeros(1, 1, dtype=torch.float8_e4m3fn).expand(shape)
        state_dict[f"{name}.weight_scale"] = torch.ones((), dtype=torch.float32)
        taken[name] = weight
    return taken


def _without_float8(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype in FLOAT8 else tensor


def _side_tensor(file: str, name: str, layout: LayerLayout, tensor: torch.Tensor) -> torch.Tensor:
    suffix = name.rpartition(".")[2]
    if layout.format == W4A16:
        _scale(file, name, tensor, negative=True)
        return tensor
    if layout.packed:
        return tensor  # check_packed looks at them
    if suffix not in ("weight_scale", "weight_scale_2"):
        return tensor
    if layout.format in (NVFP4, MXFP8) and suffix == "weight_scale":
        _scale(file, name, _block_scales(layout.format, tensor))
        return tensor
    scale = _scale(file, name, tensor)
    if scale.numel() == 1:
        return scale.reshape(())
    if layout.grid == BLOCK:
        return scale.reshape(scale.shape[0], -1)
    # One spelling per format: W4A4 kernels take a vector of row scales, the others a column.
    return scale.reshape(-1) if layout.format == W4A4 else scale.reshape(-1, 1)


def _block_scales(form: str, tensor: torch.Tensor) -> torch.Tensor:
    """As numbers; some writers store their bytes as uint8."""
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor.view(torch.float8_e4m3fn if form == NVFP4 else torch.float8_e8m0fnu)


def _scale(file: str, name: str, tensor: torch.Tensor, negative: bool = False) -> torch.Tensor:
    """As float32. negative: whether scales below 0 occur, as in files of AutoRound."""
    scale = tensor.to(torch.float32)
    sound = torch.isfinite(scale) if negative else torch.isfinite(scale) & (scale >= 0)
    if not bool(sound.all()):
        raise FrugalError(
            f"{file}: {name} holds {int((~sound).sum())} values that are "
            f"{'not finite' if negative else 'negative or not finite'}",
            "finite scales",
            "download the file again",
        )
    return scale


def declaration(plan: Plan, known: Collection[str]) -> dict[str, str]:
    """The entry `_quantization_metadata` for the planned layers; empty if none is quantised.

    `known` are the format names of the running ComfyUI. fp8 layers ask for products in full
    precision, which suits Wan better. Raises FrugalError for a format that ComfyUI does not know.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, layout in plan.layers.items():
        form = layout.format
        if form == E5M2 and form not in known and E4M3 in known:
            # Where only one fp8 format is known, its reader takes the type from the bytes.
            form = E4M3
        if form in plan.own_formats:
            # Declared as the stand-in that take_packed leaves in their place.
            form = E4M3
        if form not in known:
            count = sum(layer.format == layout.format for layer in plan.layers.values())
            if layout.computed:
                raise FrugalError(
                    f"quantising {plan.file} to {layout.format}, unknown to this ComfyUI",
                    f"one of {', '.join(sorted(known)) or 'no quantised format'}",
                    "set quantize to fp8 per-channel, or update ComfyUI",
                )
            raise FrugalError(
                f"{plan.file} holds {count} layers in {layout.format} (first {name}), "
                "unknown to this ComfyUI",
                f"one of {', '.join(sorted(known)) or 'no quantised format'}",
                "update ComfyUI and comfy-kitchen, or use an fp8 file of the same model",
            )
        entry = {"format": form, **layout.options}
        if form in FLOAT8.values():
            entry["full_precision_matrix_mult"] = True
        layers[name] = entry
    return (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        if layers
        else {}
    )
