"""Quantise a float model while it is loaded: which layers, to what, and one layer at a time.

Only the large linear layers of the blocks are quantised; embeddings, time projection, head and the
image and camera parts stay as the file holds them, as published quantised Wan files do.

fp8 per-channel: e4m3 with one scale per output row. int8 ConvRot: rows rotated in groups of inputs
by a normalised Hadamard matrix, then int8 with one scale per row. W4A8: the same rotation, 4-bit
codes with fp8 scales per 16 inputs. The last two are comfy-kitchen's formats, and its quantisers
make them.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..checkpoints.header import TensorInfo
from ..checkpoints.layouts import FLOATS, INT8, W4A8, LayerLayout
from ..checkpoints.plan import Plan
from ..checkpoints.plan_notes import format_name
from ..errors import FrugalError

AS_STORED = "as stored"
FP8, INT8_CONVROT, W4A8_NAME = "fp8 per-channel", "int8 ConvRot", "W4A8"
TARGETS = (FP8, INT8_CONVROT, W4A8_NAME)
CHOICES = (AS_STORED, *TARGETS)
LARGE = re.compile(r"(vace_)?blocks\.\d+\.(self_attn|cross_attn|ffn)\.[a-z0-9_]+$")
SCALE_GROUP = 16
# Values turned to float32 at a time: bounds the working memory of a layer.
PIECE = 1 << 22


def quantised_plan(plan: Plan, target: str, tensors: Mapping[str, TensorInfo]) -> Plan:
    """The plan with its large layers to be quantised to `target`, one of TARGETS; `tensors` are the
    facts of the file's tensors under their own names.

    Raises FrugalError if the file holds quantised layers, or a width does not suit the format.
    """
    if target not in TARGETS:
        raise FrugalError(
            f"the choice {ascii(target)[:40]}", f"one of {', '.join(CHOICES)}", "choose"
        )
    if plan.layers:
        form = next(iter(plan.layers.values())).format
        raise FrugalError(
            f"{plan.file} already holds {len(plan.layers)} layers in {form}",
            f"fp32, bf16 or fp16 weights to quantise to {target}",
            f"set quantize to '{AS_STORED}', or use an unquantised file of the same model",
        )
    layers: dict[str, LayerLayout] = {}
    formats = Counter(plan.formats)
    for raw, name in plan.rename.items():
        layer, _, leaf = name.rpartition(".")
        info = tensors[raw]
        if leaf != "weight" or len(info.shape) != 2 or not LARGE.match(layer):
            continue
        layers[layer] = layout = _layout(plan.file, layer, info.shape[1], target)
        formats[str(info.dtype).removeprefix("torch.")] -= info.nbytes
        formats[format_name(layout)] += info.numel // (2 if layout.format == W4A8 else 1)
    notes = (*plan.notes, f"{len(layers)} layers are quantised to {target} while loading")
    return replace(plan, layers=layers, formats=dict(+formats), notes=notes)


def _layout(file: str, name: str, width: int, target: str) -> LayerLayout:
    if target == FP8:
        return LayerLayout("float8_e4m3fn", per_row=True, computed=True)
    group = next((size for size in (256, 64, 16) if width % size == 0), None)
    if group is None:
        raise FrugalError(
            f"{file}: {name} has {width} inputs", f"a multiple of 16 for {target}", f"use {FP8}"
        )
    if target == INT8_CONVROT:
        options = {"convrot": True, "convrot_groupsize": group}
        return LayerLayout(INT8, options=options, computed=True)
    options = {"group_size": SCALE_GROUP, "convrot_groupsize": group}
    return LayerLayout(W4A8, options=options, computed=True)


def quantiser(
    file: str, device: torch.device, step: Callable[[], None] = lambda: None
) -> Callable[[torch.Tensor, LayerLayout], dict[str, torch.Tensor]]:
    """A function (float weight [out, in], layout) -> tensors by leaf, on the CPU, computed on
    `device`; `step` is called after each layer.

    Raises FrugalError for a weight that is not finite, and where comfy-kitchen is missing.
    """

    def quantise(weight: torch.Tensor, layout: LayerLayout) -> dict[str, torch.Tensor]:
        if weight.dtype not in FLOATS:
            raise FrugalError(
                f"{file} holds a weight in {weight.dtype}", "floats", "choose another"
            )
        make = {INT8: _int8_convrot, W4A8: _w4a8}.get(layout.format, _float8_rows)
        made = make(file, weight, layout, device)
        step()
        return {leaf: tensor.cpu() for leaf, tensor in made.items()}

    return quantise


def _pieces(file: str, weight: torch.Tensor, device: torch.device):
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows].to(device=device, dtype=torch.float32)
        if not bool(torch.isfinite(piece).all()):
            raise FrugalError(
                f"{file} holds a weight that is not finite", "finite weights", "download it again"
            )
        yield slice(start, start + rows), piece


def _float8_rows(
    file: str, weight: torch.Tensor, layout: LayerLayout, device: torch.device
) -> dict[str, torch.Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32)
    for rows, piece in _pieces(file, weight, device):
        scale = (piece.abs().amax(dim=1, keepdim=True) / largest).clamp_(min=1e-30)
        out[rows] = (piece / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn).cpu()
        scales[rows] = scale.cpu()
    return {"weight": out, "weight_scale": scales}


def _int8_convrot(
    file: str, weight: torch.Tensor, layout: LayerLayout, device: torch.device
) -> dict[str, torch.Tensor]:
    # Rows are independent, so pieces give what the whole would; float32 keeps the rotation exact.
    form = _kitchen("TensorWiseINT8Layout")
    out = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32)
    for rows, piece in _pieces(file, weight, device):
        group = layout.options["convrot_groupsize"]
        data, params = form.quantize(piece, per_channel=True, convrot=True, convrot_groupsize=group)
        out[rows], scales[rows] = data.cpu(), params.scale.reshape(-1, 1).cpu()
    return {"weight": out, "weight_scale": scales}


def _w4a8(
    file: str, weight: torch.Tensor, layout: LayerLayout, device: torch.device
) -> dict[str, torch.Tensor]:
    # One codebook serves the whole weight, so the whole goes in; the quantiser works in pieces.
    form = _kitchen("AsymW4A8Int8Layout")
    whole = torch.empty(weight.shape, dtype=torch.float32, device=device)
    for rows, piece in _pieces(file, weight, device):
        whole[rows] = piece
    data, params = form.quantize(whole, **layout.options)
    made = {"weight": data, "weight_s_rel": params.scale, "weight_s_channel": params.s_channel}
    return made if params.codebook is None else made | {"weight_codebook": params.codebook}


def _kitchen(name: str):
    try:
        return getattr(importlib.import_module("comfy_kitchen.tensor"), name)
    except (ImportError, AttributeError) as error:
        raise FrugalError(
            f"comfy-kitchen has no {name}", "a comfy-kitchen with this format", "update ComfyUI"
        ) from error
