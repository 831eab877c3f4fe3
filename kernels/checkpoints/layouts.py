"""How one linear layer is stored: from the tensors beside its weight to the name of a
quantisation format.

Two public conventions are known for 8-bit floats: `scale_weight` beside the weight, with or
without a marker tensor `scaled_fp8`, and `weight_scale`, with or without a format declared in
`comfy_quant` or in the header's `_quantization_metadata`. Formats of fewer bits are only accepted
declared: their bytes do not tell the layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import FrugalError
from ..formats import block_scales
from ..formats.packed_int import W4A16, PackedSpec
from .header import TensorInfo

FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = "plain"
# What one scale serves: the whole weight, a row, or a block of a row or of some rows.
ONE, ROW, BLOCK = "tensor", "row", "block"
INT8, W4A4, W4A8, NVFP4, MXFP8 = (
    "int8_tensorwise",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "nvfp4",
    "mxfp8",
)
NATIVE = (*FLOAT8.values(), INT8, W4A4, W4A8, NVFP4, MXFP8, W4A16)
# Those with 8-bit floats in them, as values or as scales.
WITH_FLOAT8 = (*FLOAT8.values(), W4A8, NVFP4, MXFP8)
OPTIONS = (
    "convrot",
    "convrot_groupsize",
    "group_size",
    "linear_dtype",
    "full_precision_matrix_mult",
)

# Tensors beside a weight that belong to the known formats; the value is the canonical name.
SIDE = {
    "scale_weight": "weight_scale",
    "weight_scale": "weight_scale",
    "weight_scale_inv": "weight_scale",
    "scale_input": "input_scale",
    "input_scale": "input_scale",
    "comfy_quant": "comfy_quant",
    "weight_scale_2": "weight_scale_2",
    "pre_quant_scale": "pre_quant_scale",
    "weight_s_rel": "weight_s_rel",
    "weight_s_channel": "weight_s_channel",
    "weight_codebook": "weight_codebook",
    "weight_zeros": "weight_zeros",
}
# How convert_to_quant calls fp8 with scales of another grid than ComfyUI's own.
GRIDDED = re.compile(r"(float8_e4m3fn|float8_e5m2)_(tensorwise|rowwise|blockwise|block3d)")
# Formats that quantise activations as they come, so that a stored scale for them is not used.
DYNAMIC = (INT8, W4A4, W4A8, W4A16)
# Tensors of conventions that no supported ComfyUI reads rightly; the value names the convention.
FOREIGN = {
    "weight._data": "quanto (Wan2GP)",
    "weight._scale": "quanto (Wan2GP)",
    "weight.absmax": "bitsandbytes",
    "weight.quant_map": "bitsandbytes",
    "weight.nested_absmax": "bitsandbytes",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes",
    "weight_correction": "asymmetric W4A8 with correction",
    "smooth_factor": "SVDQuant",
    "proj_down": "SVDQuant",
    "weight_zero_point": "compressed-tensors with zero points",
    "weight_packed": "compressed-tensors",
}


@dataclass(frozen=True)
class LayerLayout:
    """One linear layer: its format, what one fp8 scale serves (`grid`: ONE, ROW or BLOCK), and what
    the file left unsaid.

    `stored` maps a side tensor's name in the file (such as scale_weight) to its canonical name;
    `unit_scale` says that the file holds no scale because the weight is a plain cast; `options`
    are the declared format options; `packed` says how GPTQ, AWQ or W4A16 words are read; `lightx2v`
    marks NVFP4 in LightX2V's own convention; `computed` that the file holds floats, quantised on
    load; `unused` are tensors beside the weight that the format has no use for.
    """

    format: str
    grid: str = ONE
    unit_scale: bool = False
    stored: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    packed: PackedSpec | None = None
    lightx2v: bool = False
    computed: bool = False
    unused: tuple[str, ...] = ()


def classify(
    where: str,
    shape: tuple[int, int],
    weight: TensorInfo,
    side: Mapping[str, TensorInfo],
    declared: Mapping[str, Any] | None,
) -> LayerLayout:
    """The layout of the layer named by `where` ("file: layer"), whose unquantised weight has
    `shape` [out, in].

    `side` holds the tensors beside the weight by their last name, `declared` the format entry of
    the file, if any. Raises FrugalError for anything that is not one of the known layouts.
    """
    layout = _classify(where, shape, weight, side, declared)
    unused = tuple(suffix for suffix in side if SIDE[suffix] == "input_scale")
    if layout.format not in DYNAMIC or not unused:
        return layout
    stored = {suffix: target for suffix, target in layout.stored.items() if suffix not in unused}
    return replace(layout, stored=stored, unused=unused)


def _classify(
    where: str,
    shape: tuple[int, int],
    weight: TensorInfo,
    side: Mapping[str, TensorInfo],
    declared: Mapping[str, Any] | None,
) -> LayerLayout:
    scales = sorted(name for name in side if SIDE[name] == "weight_scale")
    if len(scales) > 1:
        raise FrugalError(
            f"{where} has both {' and '.join(scales)}", "one of them", "choose another file"
        )
    stored = {name: SIDE[name] for name in side if name != "comfy_quant"}
    canonical = {SIDE[name]: info for name, info in side.items()}
    if declared is not None:
        return _declared(where, shape, weight, canonical, stored, declared)
    extra = sorted(set(canonical) - {"weight_scale", "input_scale", "comfy_quant"})
    if extra:
        raise FrugalError(
            f"{where} has {', '.join(extra)} and no declared format",
            "a comfy_quant tensor or _quantization_metadata",
            "use a file that declares its format",
        )
    scale = canonical.get("weight_scale")
    if weight.dtype in FLOAT8:
        _check_shape(where, weight, shape)
        if scale is None:
            return LayerLayout(FLOAT8[weight.dtype], unit_scale=True, stored=stored)
        grid = _float8_grid(where, scale, shape)
        return LayerLayout(FLOAT8[weight.dtype], grid, stored=stored)
    if weight.dtype == torch.int8:
        _check_shape(where, weight, shape)
        if scale is None:
            raise FrugalError(
                f"{where} is int8 without a scale", "weight_scale beside it", "choose another file"
            )
        check_only(where, INT8, canonical, {"weight_scale", "input_scale"}, {"weight_scale"})
        _rows(where, scale, shape)
        return LayerLayout(INT8, stored=stored)
    if weight.dtype not in FLOATS:
        raise FrugalError(
            f"{where} holds {weight.text()} and no declared format",
            "fp32, bf16, fp16, fp8 or int8 weights, or a declared format",
            "use a file in a known layout",
        )
    _check_shape(where, weight, shape)
    return LayerLayout(PLAIN, stored=stored)


def _declared(
    where: str,
    shape: tuple[int, int],
    weight: TensorInfo,
    side: Mapping[str, TensorInfo],
    stored: Mapping[str, str],
    declared: Mapping[str, Any],
) -> LayerLayout:
    form, kind = declared.get("format"), None
    if (named := GRIDDED.fullmatch(str(form))) is not None:
        form, kind = named.groups()
    if form not in NATIVE:
        raise FrugalError(
            f"{where} declares the format {ascii(form)[:60]}",
            f"one of {', '.join(NATIVE)}",
            "use a file in one of these formats",
        )
    nested = declared.get("params")
    options = {
        key: value
        for source in (nested if isinstance(nested, Mapping) else {}, declared)
        for key, value in source.items()
        if key in OPTIONS
    }
    out, inside = shape
    if form in FLOAT8.values():
        if weight.dtype not in FLOAT8:
            raise FrugalError(
                f"{where} declares {form} and holds {weight.text()}",
                "fp8 weights",
                "choose another file",
            )
        _check_shape(where, weight, shape)
        check_only(where, form, side, {"weight_scale", "input_scale"}, {"weight_scale"})
        # The bytes decide: files labelled e4m3fn with e5m2 inside are known.
        grid = _float8_grid(where, side["weight_scale"], shape)
        _check_grid(where, kind, options, side["weight_scale"], shape, grid)
        return LayerLayout(FLOAT8[weight.dtype], grid, stored=stored, options=options)
    if form == W4A8 and weight.shape == (out, 3 * inside // 4):
        raise FrugalError(
            f"{where} is W6A8, 6 bits under the name {W4A8}",
            "4 bits",
            "use Load Diffusion Model in a ComfyUI whose comfy-kitchen runs it (0.2.36 or later), "
            "or a W4A8, int8 or fp8 file of the same model",
        )
    group = (
        options.get("convrot_groupsize", 256)
        if form in (W4A4, W4A8) or options.get("convrot")
        else None
    )
    if group is not None and not _power_of_four_dividing(group, inside):
        raise FrugalError(
            f"{where} declares the rotation group {ascii(group)[:20]} for width {inside}",
            "a power of 4 that divides the width",
            "convert the model again",
        )
    if form == INT8:
        _check(where, weight, torch.int8, shape)
        check_only(where, form, side, {"weight_scale", "input_scale"}, {"weight_scale"})
        _rows(where, side["weight_scale"], shape)
    elif form == W4A4:
        _check(where, weight, torch.int8, (out, inside // 2))
        check_only(where, form, side, {"weight_scale", "input_scale"}, {"weight_scale"})
        if not _rows(where, side["weight_scale"], shape):
            raise FrugalError(
                f"{where} has one scale for {out} rows", f"{out} scales", "convert the model again"
            )
    elif form == W4A8:
        _w4a8(where, shape, weight, side, options)
    elif form == W4A16:
        spec = _w4a16(where, shape, weight, side, options)
        return LayerLayout(form, stored=stored, options=options, packed=spec)
    elif form == NVFP4:
        _check(where, weight, torch.uint8, (out, inside // 2))
        allowed = {"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"}
        check_only(where, form, side, allowed, {"weight_scale", "weight_scale_2"})
        check_block_scales(
            where, side["weight_scale"], out, inside // 16, (torch.float8_e4m3fn, torch.uint8)
        )
        check_scalar(where, "weight_scale_2", side["weight_scale_2"])
        if "input_scale" in side:
            check_scalar(where, "an activation scale", side["input_scale"])
        if "pre_quant_scale" in side and side["pre_quant_scale"].numel != inside:
            raise FrugalError(
                f"{where} has {side['pre_quant_scale'].numel} smoothing factors",
                f"{inside}",
                "choose another file",
            )
    else:
        _check(where, weight, torch.float8_e4m3fn, shape)
        check_only(where, form, side, {"weight_scale", "input_scale"}, {"weight_scale"})
        check_block_scales(
            where, side["weight_scale"], out, inside // 32, (torch.float8_e8m0fnu, torch.uint8)
        )
    return LayerLayout(form, stored=stored, options=options)


def _w4a8(
    where: str,
    shape: tuple[int, int],
    weight: TensorInfo,
    side: Mapping[str, TensorInfo],
    options: Mapping[str, Any],
) -> None:
    out, inside = shape
    _check(where, weight, torch.int8, (out, inside // 2))
    both = {"weight_s_rel", "weight_s_channel"}
    check_only(where, W4A8, side, {*both, "weight_codebook", "input_scale"}, both)
    group = options.get("group_size", 16)
    if type(group) is not int or group < 4 or inside % group:
        raise FrugalError(
            f"{where} declares the scale group {ascii(group)[:20]} for width {inside}",
            "a divisor of the width, 4 or more",
            "convert the model again",
        )
    relative = side["weight_s_rel"]
    if relative.shape != (out, inside // group) or relative.dtype not in (
        torch.float8_e4m3fn,
        torch.uint8,
    ):
        raise FrugalError(
            f"{where} has group scales {relative.text()}",
            f"float8_e4m3fn [{out}, {inside // group}]",
            "convert the model again",
        )
    if side["weight_s_channel"].numel != out:
        raise FrugalError(
            f"{where} has {side['weight_s_channel'].numel} channel scales",
            f"{out}",
            "convert the model again",
        )
    if "weight_codebook" in side and side["weight_codebook"].numel != 16:
        raise FrugalError(
            f"{where} has a codebook of {side['weight_codebook'].numel} values",
            "16",
            "convert the model again",
        )


def _w4a16(
    where: str,
    shape: tuple[int, int],
    weight: TensorInfo,
    side: Mapping[str, TensorInfo],
    options: Mapping[str, Any],
) -> PackedSpec:
    out, inside = shape
    _check(where, weight, torch.int8, (out, inside // 2))
    both = {"weight_scale", "weight_zeros"}
    check_only(where, W4A16, side, {*both, "input_scale"}, both)
    group = options.get("group_size", 64)
    if type(group) is not int or group < 2 or inside % group or inside % 2:
        raise FrugalError(
            f"{where} declares the scale group {ascii(group)[:20]} for width {inside}",
            "a divisor of the width, 2 or more",
            "convert the model again",
        )
    for suffix in sorted(both):
        if side[suffix].shape != (inside // group, out) or side[suffix].dtype not in FLOATS:
            raise FrugalError(
                f"{where} has {suffix} {side[suffix].text()}",
                f"floats of shape [{inside // group}, {out}]",
                "convert the model again",
            )
    return PackedSpec(W4A16, 4, 0, out, inside, group)


def _check_grid(
    where: str,
    kind: str | None,
    options: Mapping[str, Any],
    scale: TensorInfo,
    shape: tuple[int, int],
    grid: str,
) -> None:
    """The scales of an fp8 weight must be what a name of GRIDDED says."""
    one = scale.numel == 1
    fits = {
        None: True,
        "tensorwise": one,
        "rowwise": grid == ROW or (one and shape[0] == 1),
        "block3d": grid == BLOCK,
        "blockwise": scale.shape == block_scales.squares(shape)
        and options.get("group_size", block_scales.SQUARE) == block_scales.SQUARE,
    }
    if not fits[kind]:
        raise FrugalError(
            f"{where} declares fp8 {kind} and has scales of shape {list(scale.shape)}",
            f"one scale, {[shape[0], 1]} for rowwise, {[shape[0], 'groups']} for block3d, or "
            f"{list(block_scales.squares(shape))} for blockwise with squares of "
            f"{block_scales.SQUARE}",
            "convert the model again with one scale per row",
        )


def _float8_grid(where: str, scale: TensorInfo, shape: tuple[int, int]) -> str:
    """What one scale of fp8 weights serves; refuses shapes of no known grid."""
    flat = scale.shape[:-1] if len(scale.shape) == 3 and scale.shape[-1] == 1 else scale.shape
    if scale.dtype in FLOATS and block_scales.is_grid(flat, shape):
        return BLOCK
    if len(scale.shape) == 2 and scale.numel > 1 and scale.shape[1] > 1:
        raise FrugalError(
            f"{where} has fp8 scales of shape {list(scale.shape)}",
            f"a scalar, one per row, [{shape[0]}, groups that divide {shape[1]}] or "
            f"{list(block_scales.squares(shape))} for squares of 128",
            "use a file with one scale per tensor, row or block",
        )
    return ROW if _rows(where, scale, shape) else ONE


def _rows(where: str, scale: TensorInfo, shape: tuple[int, int]) -> bool:
    """Whether a scale is per row ([out] or [out, 1]) and not a scalar; refuses any other shape."""
    if scale.dtype not in FLOATS:
        raise FrugalError(
            f"{where} has a scale in {scale.text()}", "a float scale", "choose another file"
        )
    if scale.numel == 1 and len(scale.shape) <= 2:
        return False
    if scale.shape in ((shape[0],), (shape[0], 1)):
        return True
    raise FrugalError(
        f"{where} has scales of shape {list(scale.shape)}",
        f"a scalar, [{shape[0]}] or [{shape[0]}, 1]",
        "use a file with one scale per tensor or per row",
    )


def check_block_scales(
    where: str, scale: TensorInfo, rows: int, groups: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises FrugalError unless there is one scale per group, with the padding of the tiled order
    or without.
    """
    padded = (math.ceil(rows / 128) * 128) * (math.ceil(groups / 4) * 4)
    if scale.numel not in (rows * groups, padded) or scale.dtype not in dtypes:
        raise FrugalError(
            f"{where} has block scales {scale.text()}",
            f"{rows} x {groups} of {str(dtypes[0]).removeprefix('torch.')}",
            "convert the model again",
        )


def check_scalar(where: str, name: str, info: TensorInfo) -> None:
    """Raises FrugalError unless the tensor holds one number."""
    if info.numel != 1:
        raise FrugalError(
            f"{where} has {name} of shape {list(info.shape)}", "one number", "choose another file"
        )


def check_only(
    where: str, form: str, side: Mapping[str, Any], allowed: set[str], needed: set[str]
) -> None:
    """Raises FrugalError for tensors of a layer that are missing, or foreign to its format."""
    absent, extra = sorted(needed - set(side)), sorted(set(side) - allowed - {"comfy_quant"})
    if absent:
        raise FrugalError(
            f"{where} is {form} without {', '.join(absent)}",
            "all its tensors",
            "download the file again",
        )
    if extra:
        raise FrugalError(
            f"{where} is {form} with {', '.join(extra)}", "no such tensor", "choose another file"
        )


def _check(where: str, weight: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if weight.dtype != dtype:
        raise FrugalError(
            f"{where} holds {weight.text()}",
            f"{str(dtype).removeprefix('torch.')}",
            "choose another file",
        )
    _check_shape(where, weight, shape)


def _check_shape(where: str, weight: TensorInfo, shape: tuple[int, ...]) -> None:
    if weight.shape != shape:
        raise FrugalError(
            f"{where} has a weight of shape {list(weight.shape)}",
            f"{list(shape)}",
            "choose a Wan file",
        )


def _power_of_four_dividing(group: Any, width: int) -> bool:
    return (
        type(group) is int
        and group >= 4
        and group.bit_count() == 1
        and group.bit_length() % 2 == 1
        and width % group == 0
    )
