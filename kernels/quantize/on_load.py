"""Quantise a float model while it is loaded: which layers, to what, and one layer at a time.

Only the large linear layers of the blocks are quantised; embeddings, time projection, head and the
image and camera parts stay as the file holds them, as published quantised Wan files do.

fp8 per-channel: e4m3 with one scale per output row. int8 ConvRot: rows rotated in groups of inputs
by a normalised Hadamard matrix, then int8 with one scale per row. W4A8: the same rotation, 4-bit
codes with fp8 scales per 16 inputs. The last two are made by formats/codec.py; the first is in no
file that ComfyUI reads, so it is here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..checkpoints.header import TensorInfo
from ..checkpoints.layouts import FLOATS, INT8, ROW, W4A8, LayerLayout
from ..checkpoints.resolve import Plan
from ..checkpoints.resolve_notes import format_name
from ..errors import FrugalError
from ..formats import codec, table
from ..formats.block_scales import round_rows

AS_STORED = "as stored"
FP8, INT8_CONVROT, W4A8_NAME = "fp8 per-channel", "int8 ConvRot", "W4A8"
TARGETS = (FP8, INT8_CONVROT, W4A8_NAME)
CHOICES = (AS_STORED, *TARGETS)
LARGE = re.compile(r"(vace_)?blocks\.\d+\.(self_attn|cross_attn|ffn)\.[a-z0-9_]+$")
BY_FORMAT = {INT8: table.INT8, W4A8: table.W4A8}
SHARED = {INT8_CONVROT: table.INT8, W4A8_NAME: table.W4A8}


def quantised_plan(plan: Plan, target: str, tensors: Mapping[str, TensorInfo]) -> Plan:
    """The plan with its large layers to be quantised to `target`, one of TARGETS; `tensors` are the
    facts of the file's tensors under their own names.

    Raises FrugalError if the file holds quantised layers, or a width does not suit the format.
    """
    if target not in TARGETS:
        raise FrugalError(
            f"the choice {ascii(target)[:40]}",
            f"one of {', '.join(CHOICES)}",
            "choose one of these",
        )
    if plan.layers:
        form = next(iter(plan.layers.values())).format
        raise FrugalError(
            f"{plan.file} already holds {len(plan.layers)} layers in {form}",
            f"fp32, bf16 or fp16 weights to quantise to {target}",
            f"set quantize to '{AS_STORED}', or use an unquantised file of the same model",
        )
    layers: dict[str, LayerLayout] = {}
    sizes = Counter(plan.formats)
    for raw, name in plan.rename.items():
        layer, _, suffix = name.rpartition(".")
        info = tensors[raw]
        if suffix != "weight" or len(info.shape) != 2 or not LARGE.match(layer):
            continue
        layers[layer] = layout = _layout(plan.file, layer, info.shape[1], target)
        sizes[str(info.dtype).removeprefix("torch.")] -= info.nbytes
        sizes[format_name(layout)] += info.numel // (2 if layout.format == W4A8 else 1)
    notes = (*plan.notes, f"{len(layers)} layers are quantised to {target} while loading")
    return replace(plan, layers=layers, formats=dict(+sizes), notes=notes)


def _layout(file: str, name: str, width: int, target: str) -> LayerLayout:
    if target == FP8:
        return LayerLayout("float8_e4m3fn", ROW, computed=True)
    if table.suits(SHARED[target], (1, width)):
        raise FrugalError(
            f"{file}: {name} has {width} inputs", f"a multiple of 16 for {target}", f"use {FP8}"
        )
    declared = table.options(SHARED[target], (1, width))
    form = declared.pop("format")
    return LayerLayout(form, options=declared, computed=True)


def quantiser(
    file: str, device: torch.device, step: Callable[[], None] = lambda: None
) -> Callable[[torch.Tensor, LayerLayout], dict[str, torch.Tensor]]:
    """A function (float weight [out, in], layout) -> tensors by suffix, on the CPU, computed on
    `device`; `step` is called after each layer.

    Raises FrugalError for a weight that is not finite, and where comfy-kitchen is missing.
    """

    def quantise(weight: torch.Tensor, layout: LayerLayout) -> dict[str, torch.Tensor]:
        if weight.dtype not in FLOATS:
            raise FrugalError(
                f"{file} holds a weight in {weight.dtype}",
                "floats",
                "use an fp32, fp16 or bf16 file of the same model",
            )
        if layout.format in BY_FORMAT:
            made = codec.encode(BY_FORMAT[layout.format], weight, device, where=file)
            made.pop(table.DECLARATION)
        else:
            made = _float8_rows(file, weight, device)
        step()
        return made

    return quantise


def _float8_rows(file: str, weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32)
    for rows, piece in codec.pieces(weight, device, file):
        made, scale = round_rows(piece, torch.float8_e4m3fn)
        out[rows], scales[rows] = made.cpu(), scale.cpu()
    return {"weight": out, "weight_scale": scales}
