"""Layers of the conventions that need more than new names: GPTQ, AWQ, GGUF's blocks, and
LightX2V's NVFP4.

GPTQ and AWQ layers are recognised by the shape of their words alone; what the words do not tell
(the zero point convention of GPTQ) comes from the file's metadata or the quantisation settings
beside it, and must agree with them. The arithmetic is in `formats/packed_int.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .. import json_text
from ..errors import FrugalError
from ..formats.gguf_blocks import TYPES, largest
from ..formats.packed_int import (
    AWQ,
    GGUF,
    GPTQ,
    PackedSpec,
    PackedWeight,
    dequantise,
    stored_zero_points,
)
from .header import TensorInfo
from .layouts import FLOATS, NVFP4, LayerLayout, check_block_scales, check_only, check_scalar

PACKED = (GPTQ, AWQ, GGUF)
WORDS = "qweight"
CONFIG = "quantization_config"
# Tensors beside (or in place of) a weight, and their canonical names.
SIDE = {
    WORDS: "weight",
    "qzeros": "weight_zeros",
    "scales": "weight_scale",
    "g_idx": "weight_g_idx",
}
LIGHTX2V_PAIRS = (("alpha", "input_global_scale"), ("weight_global_scale", "input_absmax"))
LIGHTX2V = tuple(suffix for pair in LIGHTX2V_PAIRS for suffix in pair)
# The largest value that NVFP4 with e4m3 block scales holds: 6 x 448.
NVFP4_LARGEST = 2688.0
# AutoRound's own label for GPTQ's packing, whose first version it keeps to.
AUTO_ROUND = ("auto-round", "intel/auto-round")
AUTO_ROUND_GPTQ = "auto_round:auto_gptq"
REPACK = "use a file that ComfyUI-Frugal lists in docs/wan-files.md"


def settings(file: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata say of the quantisation: entries of quantization_config, and AutoGPTQ's own
    gptq_... entries. Raises FrugalError if they are no JSON object.
    """
    found: dict[str, Any] = {}
    if CONFIG in metadata:
        try:
            found = json_text.parse(metadata[CONFIG])
        except ValueError:
            found = None  # type: ignore[assignment]
        if not isinstance(found, dict):
            raise FrugalError(
                f"{file} comes with a {CONFIG} that is no JSON object",
                "settings of GPTQ or AWQ",
                "download the file and its settings again",
            )
        gptq = found.get("packing_format") == AUTO_ROUND_GPTQ
        if gptq and found.get("quant_method") in AUTO_ROUND:
            found["quant_method"] = GPTQ
        if "checkpoint_format" not in found and "format" in found:
            found["checkpoint_format"] = found["format"]
    for key in ("checkpoint_format", "bits"):
        if f"gptq_{key}" in metadata:
            found.setdefault(key, metadata[f"gptq_{key}"])
    return found


def classify_packed(
    where: str, shape: tuple[int, int], side: Mapping[str, TensorInfo], stated: Mapping[str, Any]
) -> LayerLayout:
    """The layout of a GPTQ or AWQ layer whose true weight has `shape` [out, in].

    `side` holds all tensors of the layer but the bias, `stated` the settings of the file. Raises
    FrugalError for a missing or foreign tensor, another shape, or settings that disagree.
    """
    out, inside = shape
    _check_undeclared(where, side)
    check_only(where, "packed", side, {*SIDE}, {WORDS, "qzeros", "scales"})
    words, scales, zeros = side[WORDS], side["scales"], side["qzeros"]
    order, bits = _order(where, shape, words, stated)
    if words.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise FrugalError(
            f"{where} holds words in {words.text()} and zeros in {zeros.text()}", "int32", REPACK
        )
    if len(scales.shape) != 2 or scales.shape[1] != out or scales.dtype not in FLOATS:
        raise FrugalError(
            f"{where} has scales {scales.text()}", f"floats of shape [groups, {out}]", REPACK
        )
    groups = scales.shape[0]
    expected = (groups, out * bits // 32)
    if zeros.shape != expected or out * bits % 32:
        raise FrugalError(
            f"{where} has zeros of shape {list(zeros.shape)}", f"{list(expected)}", REPACK
        )
    index = side.get("g_idx")
    if index is not None and (order == AWQ or index.shape != (inside,)):
        raise FrugalError(
            f"{where} has a g_idx of shape {list(index.shape)}", f"[{inside}], and GPTQ", REPACK
        )
    if index is not None and index.dtype not in (torch.int32, torch.int64):
        raise FrugalError(f"{where} has a g_idx in {index.text()}", "int32", REPACK)
    if not groups or (index is None and inside % groups):
        raise FrugalError(
            f"{where} has {groups} groups of scales for width {inside}", "a divisor", REPACK
        )
    spec = PackedSpec(
        order, bits, _zero_offset(where, order, stated), out, inside, inside // groups
    )
    return LayerLayout(
        order, stored={suffix: SIDE[suffix] for suffix in side if suffix != WORDS}, packed=spec
    )


def classify_blocks(
    where: str, shape: tuple[int, int], info: TensorInfo, side: Mapping[str, TensorInfo]
) -> LayerLayout:
    """The layout of a layer whose weight is GGUF blocks. Raises FrugalError for a tensor beside it
    that would change it, or another shape.
    """
    check_only(where, info.text(), side, set(), set())
    if info.shape != shape:
        raise FrugalError(
            f"{where} has a weight of shape {list(info.shape)}", f"{list(shape)}", REPACK
        )
    form = TYPES[info.blocks]
    bits = 8 * form.size // form.values
    spec = PackedSpec(GGUF, bits, 0, *shape, form.values, info.blocks)
    return LayerLayout(GGUF, packed=spec)


def _check_undeclared(where: str, side: Mapping[str, Any]) -> None:
    if "comfy_quant" in side:
        raise FrugalError(
            f"{where} has a comfy_quant beside {', '.join(sorted(set(side) - {'comfy_quant'}))}",
            "one convention",
            "choose another file",
        )


def _order(
    where: str, shape: tuple[int, int], words: TensorInfo, stated: Mapping[str, Any]
) -> tuple[str, int]:
    out, inside = shape
    kinds: dict[tuple[int, ...], tuple[str, int]] = {
        (inside // 8, out): (GPTQ, 4),
        (inside // 4, out): (GPTQ, 8),
        (inside, out // 8): (AWQ, 4),
    }
    if words.shape not in kinds or inside % 8 or out % 8:
        raise FrugalError(
            f"{where} holds words of shape {list(words.shape)} for a weight of {list(shape)}",
            f"GPTQ with 4 or 8 bits {[inside // 8, out]}, {[inside // 4, out]}, or AWQ of version "
            f"GEMM {[inside, out // 8]}",
            REPACK,
        )
    order, bits = kinds[words.shape]
    says = str(stated.get("quant_method", order)).lower()
    width = str(stated.get("bits", stated.get("w_bit", bits)))
    if order not in says or width != str(bits):
        raise FrugalError(
            f"{where} is {order} with {bits} bits, while the settings say {ascii(says)[:40]} with "
            f"{ascii(width)[:20]}",
            "settings of this file",
            "download the file and its settings again",
        )
    return order, bits


def _zero_offset(where: str, order: str, stated: Mapping[str, Any]) -> int:
    if order == AWQ:
        return 0
    form = str(stated.get("checkpoint_format", "gptq")).lower()
    if form not in ("gptq", "gptq_v2"):
        raise FrugalError(
            f"{where} comes in the checkpoint format {ascii(form)[:40]}", "gptq or gptq_v2", REPACK
        )
    return 0 if form == "gptq_v2" else 1


def check_packed(where: str, weight: PackedWeight, stated: Mapping[str, Any]) -> None:
    """Refuse values that make the weight ambiguous or meaningless; reads scales, zeros and g_idx.

    Raises FrugalError for scales that are not finite, group numbers out of range, and zero points
    that readers of the first GPTQ version take differently.
    """
    if weight.scales is None or weight.zeros is None:
        # GGUF's scales are in its blocks; what they come to is checked against a type.
        return
    if not bool(torch.isfinite(weight.scales).all()):
        raise FrugalError(f"{where} has scales that are not finite", "finite scales", REPACK)
    count = weight.scales.shape[0]
    if weight.g_idx is not None and not (
        int(weight.g_idx.min()) >= 0 and int(weight.g_idx.max()) < count
    ):
        raise FrugalError(
            f"{where} has group numbers {int(weight.g_idx.min())} to {int(weight.g_idx.max())}",
            f"0 to {count - 1}",
            "download the file again",
        )
    spec = weight.spec
    if spec.order != GPTQ:
        return
    stored = stored_zero_points(weight.zeros, spec)
    low, high = int(stored.min()), int(stored.max())
    middle = 1 << (spec.bits - 1)
    if spec.zero_offset and high == spec.largest:
        # Stored z - 1: some readers add 1 to get 16, others wrap to 0, and the first packers
        # let the borrow spoil the neighbouring values.
        raise FrugalError(
            f"{where} stores {int((stored == high).sum())} zero points as {high}, which readers of "
            "GPTQ version 1 take differently",
            "zero points that are not 0",
            "convert the model with the checkpoint format gptq_v2, or with symmetric groups",
        )
    symmetric = str(stated.get("sym", "")).lower() == "true"
    doubtful = "checkpoint_format" not in stated and low == high == middle
    if doubtful or (symmetric and not low == high == middle - spec.zero_offset):
        raise FrugalError(
            f"{where} stores zero points {low} to {high}"
            + (", which is the middle in version 2 and not in version 1" if doubtful else ""),
            f"{middle - spec.zero_offset} for symmetric groups",
            "add a quantize_config.json with the checkpoint_format (gptq or gptq_v2) beside the "
            "file, in a folder of its own",
        )


def check_blocks(where: str, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Refuse GGUF blocks with values that are not finite in `dtype`; reads every block once."""
    if weight.spec.order != GGUF:
        return
    most, top = largest(weight.words, weight.spec.blocks), torch.finfo(dtype).max
    if most <= top:
        return
    if math.isfinite(most):
        # A bound, so look: only a damaged or very odd layer comes here.
        most = float(dequantise(weight, torch.float32).abs().amax())
    if not math.isfinite(most):
        raise FrugalError(
            f"{where} holds values that are not finite", "finite weights", "download the file again"
        )
    if most > top:
        raise FrugalError(
            f"{where} holds values beyond {str(dtype).removeprefix('torch.')}",
            "finite weights",
            "set weight_dtype to bf16, or download the file again",
        )


def is_lightx2v(side: Mapping[str, Any]) -> bool:
    """Whether a layer has a tensor that LightX2V's NVFP4 files alone have."""
    return any(suffix in side for suffix in LIGHTX2V)


def classify_lightx2v(
    where: str, shape: tuple[int, int], weight: TensorInfo, side: Mapping[str, TensorInfo]
) -> LayerLayout:
    """The layout of a LightX2V NVFP4 layer: weight uint8 [out, in / 2] with the even input in the
    low half, weight_scale e4m3 per 16 inputs in the tiled order of the matrix units, and either
    alpha with input_global_scale or weight_global_scale with input_absmax.
    """
    out, inside = shape
    pair = next((pair for pair in LIGHTX2V_PAIRS if all(suffix in side for suffix in pair)), None)
    if pair is None:
        raise FrugalError(
            f"{where} has {', '.join(sorted(set(side) & set(LIGHTX2V)))} of LightX2V NVFP4",
            "alpha with input_global_scale, or weight_global_scale with input_absmax",
            "download the file again",
        )
    _check_undeclared(where, side)
    check_only(where, "LightX2V NVFP4", side, {"weight_scale", *LIGHTX2V}, {"weight_scale"})
    for suffix in set(side) & set(LIGHTX2V):
        check_scalar(where, suffix, side[suffix])
    if weight.dtype != torch.uint8 or weight.shape != (out, inside // 2) or inside % 16:
        raise FrugalError(
            f"{where} holds {weight.text()}", f"uint8 [{out}, {inside // 2}]", "choose another file"
        )
    e4m3 = (torch.float8_e4m3fn, torch.uint8)
    check_block_scales(where, side["weight_scale"], out, inside // 16, e4m3)
    return LayerLayout(NVFP4, stored={suffix: suffix for suffix in side}, lightx2v=True)


def from_lightx2v(where: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's NVFP4 tensors of one layer from LightX2V's (suffix -> tensor).

    Half bytes change places (a copy of the packed weight); the scale of the whole weight is
    alpha x input_global_scale = 1 / weight_global_scale; input_scale is 1 / input_global_scale.
    Raises FrugalError for scales that are not finite and positive, or that contradict each other.
    """

    def number(suffix: str) -> float:
        value = float(tensors[suffix].float())
        if not 0 < value < float("inf"):
            raise FrugalError(
                f"{where} has {suffix} = {value}", "a positive number", "download the file again"
            )
        return value

    outer: list[float] = []
    inputs: list[float] = []
    if "alpha" in tensors and "input_global_scale" in tensors:
        outer.append(number("alpha") * number("input_global_scale"))
        inputs.append(number("input_global_scale"))
    if "weight_global_scale" in tensors and "input_absmax" in tensors:
        outer.append(1 / number("weight_global_scale"))
        inputs.append(NVFP4_LARGEST / number("input_absmax"))
    if max(outer) > 1.001 * min(outer) or max(inputs) > 1.001 * min(inputs):
        raise FrugalError(
            f"{where} has weight scales {outer} and input scales {inputs}",
            "pairs of scales that agree",
            "download the file again",
        )
    packed = tensors["weight"]
    swapped = torch.bitwise_or(packed >> 4, packed << 4)
    return {
        "weight": swapped,
        "weight_scale": tensors["weight_scale"],
        "weight_scale_2": torch.tensor(outer[0], dtype=torch.float32),
        "input_scale": torch.tensor(1 / inputs[0], dtype=torch.float32),
    }
