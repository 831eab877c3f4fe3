"""Wan models into ComfyUI: plan from the header, checks against the running version, load,
check of the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_detection
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file

from ...kernels.checkpoints.layouts import FLOAT8, ONE, WITH_FLOAT8
from ...kernels.checkpoints.matmul_precision import AUTO, FULL
from ...kernels.checkpoints.normalise import declaration, normalise, take_packed
from ...kernels.checkpoints.packed import check_blocks
from ...kernels.checkpoints.resolve import Plan, plan_wan
from ...kernels.checkpoints.source import Source, open_source
from ...kernels.checkpoints.wan_shapes import TEXT_DIM
from ...kernels.device_types import need_float8
from ...kernels.errors import FrugalError
from ...kernels.formats.gguf_blocks import TYPES
from ...kernels.formats.packed_int import W4A16, PackedWeight
from ...kernels.quantize.on_load import AS_STORED, quantised_plan, quantiser
from ...kernels.report import LoadReport, megabytes
from .._comfy import REPORT_KEY, round_patched
from . import mapped, matmul, packed_int, patched_on_use, row_scaled
from .structure import structure

DEFAULT = "default"
# What quantising the largest layer takes on the device, in bytes, with room to spare.
QUANTISE_MEMORY = 3 * 10**9
KEPT_BESIDE = ("input_scale", "pre_quant_scale")
WEIGHT_DTYPES = {
    DEFAULT: None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


def load_wan(
    path: Path,
    weight_dtype: str = DEFAULT,
    quantize: str = AS_STORED,
    products: str = AUTO,
    disable_dynamic: bool = False,
) -> tuple[Any, LoadReport]:
    """Load a Wan file as (ModelPatcher, LoadReport), quantised to `quantize` on the way if that is
    not AS_STORED, its quantised layers multiplying in the precision `products`. Raises FrugalError,
    before weights are read where possible.
    """
    started = time.perf_counter()
    source = open_source(path, WEIGHT_DTYPES[weight_dtype])
    plan = plan_wan(source.name, source.tensors, source.metadata, source.value, structure)
    # ComfyUI's kernel for it multiplies in 16 bit.
    if W4A16 not in _known_formats() or products == FULL:
        plan = replace(plan, own_formats=(*plan.own_formats, W4A16))
    plan = _with_choice(plan, source, quantize)
    _check_weight_dtype(plan, weight_dtype)
    _check_device(plan)
    precision, kernels = matmul.planned(plan, products)
    metadata = declaration(plan, _known_formats())
    if plan.transformer:
        metadata["config"] = json.dumps({"transformer": dict(plan.transformer)})
    _check_detection(plan, metadata)
    state_dict = normalise(plan, _tensors(source), _quantiser(plan))
    packed = take_packed(plan, state_dict)
    plan = _with_preferences(plan, state_dict)
    state_types = {name: tensor.dtype for name, tensor in state_dict.items()}
    options = {} if weight_dtype == DEFAULT else {"dtype": WEIGHT_DTYPES[weight_dtype]}
    if not plan.layers and mapped.useful():
        options["custom_operations"] = mapped.MappedOps
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(state_dict), model_options=options, metadata=dict(metadata), **extra
    )
    if patcher is None:
        raise FrugalError(
            f"{plan.file} was refused by ComfyUI's model detection",
            "a Wan variant that it knows",
            "update ComfyUI",
        )
    _check_loaded(plan, state_types, patcher.model.diffusion_model)
    _finish_quantised(plan, packed, patcher.model.diffusion_model)
    if packed:
        _keep_as_stored(plan, state_dict, patcher.model.diffusion_model)
        patched_on_use.keep_packed(patcher)
    applied = matmul.apply(precision, kernels, patcher.model.diffusion_model)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (
            load_patcher,
            (path, weight_dtype, quantize, products),
        )
    report = LoadReport(
        f"Wan {plan.config.variant} {plan.config.size}, {plan.config.layers} blocks",
        source.sizes(),
        dict(plan.formats),
        time.perf_counter() - started,
        (
            *plan.notes,
            *precision.notes,
            *applied,
            *_converted(plan, state_types, patcher.model.diffusion_model),
        ),
        folder="/".join(source.files[0].resolve().parts[-3:-1]),
    )
    patcher.set_attachments(REPORT_KEY, report)
    return patcher, report


def load_patcher(
    path: Path,
    weight_dtype: str,
    quantize: str = AS_STORED,
    products: str = AUTO,
    disable_dynamic: bool = False,
) -> Any:
    """The model again, as ComfyUI asks for it when it needs a second, static copy."""
    return load_wan(path, weight_dtype, quantize, products, disable_dynamic)[0]


def _with_choice(plan: Plan, source: Source, quantize: str) -> Plan:
    """The plan with what the user chose, and with a note on what unpacking takes."""
    if source.blocks:
        kinds = ", ".join(f"{kind} {megabytes(size)}" for kind, size in source.blocks.items())
        if quantize != AS_STORED:
            raise FrugalError(
                f"{source.name} holds quantised blocks ({kinds})",
                f"fp32, bf16 or fp16 weights to quantise to {quantize}",
                f"set quantize to '{AS_STORED}', or use an unquantised file of the same model",
            )
        kept = sum(info.nbytes for info in source.tensors.values() if info.blocks)
        size = sum(source.blocks.values()) - kept
        if not size:
            return plan
        total = megabytes(sum(plan.formats.values()))
        note = (
            f"{megabytes(size)} of GGUF blocks ({kinds}) are unpacked while loading: the model "
            f"takes {total} of memory; the types {', '.join(TYPES)} stay packed where weight_dtype "
            f"is {DEFAULT}"
        )
        return replace(plan, notes=(*plan.notes, note))
    return plan if quantize == AS_STORED else quantised_plan(plan, quantize, source.tensors)


def _with_preferences(plan: Plan, state_dict: dict[str, torch.Tensor]) -> Plan:
    """The plan with a note on the file's choices of attention kernels; where the running ComfyUI
    does not read them, they are taken out of the state dict, which changes.
    """
    if not plan.preferences:
        return plan
    count, first = len(plan.preferences), plan.preferences[0]
    said = ascii(bytes(state_dict[first].flatten().tolist()).decode(errors="replace"))[1:-1][:80]
    what = f"{count} layers choose their attention kernel (first {said})"
    if hasattr(comfy.ldm.modules.attention, "ComfyAttention"):
        return replace(plan, notes=(*plan.notes, f"{what}: left to ComfyUI"))
    for name in plan.preferences:
        del state_dict[name]
    note = f"{what}, which this ComfyUI does not read: attention runs as it is set here"
    return replace(plan, notes=(*plan.notes, note))


def _quantiser(plan: Plan) -> Any:
    """A function for `normalise` that quantises layers on ComfyUI's device, with progress and
    cancelling; None where nothing is to be quantised.
    """
    count = sum(layout.computed for layout in plan.layers.values())
    if not count:
        return None
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        comfy.model_management.free_memory(QUANTISE_MEMORY, device)
    progress = comfy.utils.ProgressBar(count)
    return quantiser(plan.file, device, lambda: progress.update(1))


def _known_formats() -> tuple[str, ...]:
    return tuple(getattr(comfy.quant_ops, "QUANT_ALGOS", {}))


def _check_weight_dtype(plan: Plan, weight_dtype: str) -> None:
    if weight_dtype != DEFAULT and plan.layers:
        form = next(iter(plan.layers.values())).format
        raise FrugalError(
            f"{plan.file} holds {len(plan.layers)} layers in {form}",
            f"an unquantised file for the weight type {weight_dtype}",
            f"set weight_dtype to {DEFAULT}",
        )
    own = (*plan.gridded, *plan.packed)
    if own and not row_scaled.supported():
        raise FrugalError(
            f"{plan.file} holds {len(own)} layers in GPTQ, AWQ, GGUF, W4A16 or row-wise fp8",
            "a ComfyUI with quantised tensors",
            "update ComfyUI, or use an fp8 file with one scale per tensor",
        )


def _check_device(plan: Plan) -> None:
    held = sorted({each.format for each in plan.layers.values()} & set(WITH_FLOAT8))
    if held:
        need_float8(
            comfy.model_management.get_torch_device(),
            f"{plan.file} comes as {', '.join(held)}",
            "load an fp16, bf16, int8, GPTQ, AWQ or GGUF file of the same model, or quantize an "
            "unquantised one to int8 ConvRot",
        )


def _check_detection(plan: Plan, metadata: dict[str, str]) -> None:
    """Ask ComfyUI what it would make of these shapes, on tensors without memory."""
    shapes = {name: torch.empty(entry.shape, device="meta") for name, entry in plan.table.items()}
    detected = comfy.model_detection.detect_unet_config(shapes, "", metadata=dict(metadata))
    fits = detected and comfy.model_detection.model_config_from_unet_config(dict(detected), shapes)
    if not fits:
        raise FrugalError(
            f"{plan.file} is a {plan.config.variant} model with {plan.config.in_dim} "
            "input channels",
            "a variant that this ComfyUI knows",
            "update ComfyUI or choose another variant",
        )
    defaults = {"text_dim": TEXT_DIM, "causal_ar": False}
    for key, value in plan.transformer.items():
        if detected.get(key, defaults.get(key)) != value:
            raise FrugalError(
                f"{plan.file} asks for {key} = {ascii(value)[:40]}, which this ComfyUI "
                "does not read",
                "a ComfyUI that takes the model's own configuration",
                "update ComfyUI",
            )


def _tensors(source: Source) -> Mapping[str, torch.Tensor]:
    if source.loaded:
        return source.loaded
    tensors: dict[str, torch.Tensor] = {}
    theirs = mapped.reads(info.dtype for info in source.tensors.values())
    for path in source.files:
        tensors.update(comfy.utils.load_torch_file(str(path)) if theirs else load_file(path))
    return tensors


def _check_loaded(plan: Plan, given: Mapping[str, torch.dtype], model: torch.nn.Module) -> None:
    """ComfyUI only logs missing and unexpected keys, and casts a weight whose label differs
    from its type. `given` are the types of the state dict that it got.
    """
    loaded = dict(model.named_parameters())
    wanted = set(plan.table)
    loaded |= {name: held for name, held in model.named_buffers() if name in wanted}
    # ComfyUI keeps these beside an NVFP4 weight as parameters of the layer.
    wanted |= {name for name in given if name.rpartition(".")[2] in KEPT_BESIDE}
    missing, unknown = sorted(set(loaded) - wanted), sorted(wanted - set(loaded))
    if missing or unknown:
        raise FrugalError(
            f"{plan.file} leaves {missing[0]} unset"
            if missing
            else f"{plan.file} holds {unknown[0]} without a place",
            f"the {len(loaded)} parameters of the model that ComfyUI built",
            "update ComfyUI, or report the file to ComfyUI-Frugal",
        )
    for layer in plan.layers:
        data = getattr(loaded[f"{layer}.weight"], "_qdata", None)
        if data is None or data.dtype != given[f"{layer}.weight"]:
            raise FrugalError(
                f"{plan.file}: {layer} arrived as "
                f"{getattr(data, 'dtype', 'an unquantised tensor')}",
                f"{given[f'{layer}.weight']} as it was handed over",
                "update ComfyUI, or report the file to ComfyUI-Frugal",
            )


def _converted(
    plan: Plan, given: Mapping[str, torch.dtype], model: torch.nn.Module
) -> tuple[str, ...]:
    """A note on what an unquantised model takes because ComfyUI converted it."""
    if plan.layers:
        return ()
    changed = [tensor for name, tensor in model.named_parameters() if tensor.dtype != given[name]]
    size = sum(tensor.nbytes for tensor in changed)
    if not size:
        return ()
    return (
        f"{megabytes(size)} are converted to {str(changed[0].dtype).removeprefix('torch.')} in "
        "memory; a weight_dtype equal to the file's leaves weights in the mapped file",
    )


def _keep_as_stored(
    plan: Plan, state_dict: Mapping[str, torch.Tensor], model: torch.nn.Module
) -> None:
    """Let the linear layers beside packed ones keep the file's mapping too, where ComfyUI copied
    them to a type that is no smaller: they are cast when they run, as packed ones are unpacked.
    """
    for name, entry in plan.table.items():
        layer, stored = name.removesuffix(".weight"), state_dict.get(name)
        if not entry.linear or layer in plan.layers or stored is None:
            continue
        module: Any = model.get_submodule(layer)
        if stored.dtype.itemsize <= module.weight.dtype.itemsize:
            # In older versions this is what has a layer cast its weight.
            module._full_precision_mm = True
            module.weight = torch.nn.Parameter(stored, requires_grad=False)


def _finish_quantised(
    plan: Plan, packed: Mapping[str, PackedWeight], model: torch.nn.Module
) -> None:
    for name, layout in plan.layers.items():
        module = model.get_submodule(name)
        if layout.format in FLOAT8.values() or name in packed:
            # Older versions ignore the declaration of full precision.
            module._full_precision_mm = True
        round_patched(module)
        if name in packed:
            packed_int.wrap(module, packed[name])
            check_blocks(f"{plan.file}: {name}", packed[name], packed_int.compute_dtype(module))
        elif layout.format == W4A16:
            packed_int.make_patchable(module)
        if layout.grid != ONE:
            row_scaled.wrap(module)
