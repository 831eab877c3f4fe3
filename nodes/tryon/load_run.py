"""From files to ComfyUI's MODEL and VAE: the part of the try-on family that builds models."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy.model_detection import detect_unet_config

from ...kernels.checkpoints import catvton
from ...kernels.checkpoints.source import check_file
from ...kernels.device_types import need_float8
from ...kernels.errors import FrugalError
from ...kernels.json_text import read_object
from ...kernels.report import LoadReport
from ...kernels.tryon import precision
from .._comfy import REPORT_KEY, known
from .unet import CatVTONConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS_LICENCE = "CatVTON weights: CC BY-NC-SA 4.0, non-commercial"
SD15_WIDTH, SD15_CONTEXT = 320, 768


def read_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (views of the mapped file, never to be written to) and safetensors metadata."""
    check_file(Path(path))
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = ascii((str(error).splitlines() or [type(error).__name__])[0])[1:-1][:160]
        raise FrugalError(
            f"{os.path.basename(path)} cannot be read as plain weights ({reason})",
            "a file that holds tensors only",
            "use a safetensors copy of the model",
        ) from error
    strays = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if strays:
        raise FrugalError(
            f"{os.path.basename(path)} has '{strays[0]}', which is no tensor",
            "a state dict",
            "convert the file to safetensors",
        )
    return tensors, metadata or {}


def read_base(path: str) -> tuple[str, dict[str, torch.Tensor], dict[str, str]]:
    """(weights file, tensors, metadata) of a base: one file, or a diffusers folder with `unet/`.

    A folder's JSON files stand in for metadata: number of heads (`attention_head_dim`, which
    diffusers uses under that name for SD 1.5) and prediction type; keys inside the file win.
    """
    if not os.path.isdir(path):
        return path, *read_file(path)
    file = diffusers_weights(path)
    tensors, metadata = read_file(file)
    heads = _read_json(os.path.join(path, "unet", "config.json")).get("attention_head_dim", 8)
    scheduler = _read_json(os.path.join(path, "scheduler", "scheduler_config.json"))
    beside = {
        "num_heads": str(heads),
        "modelspec.prediction_type": str(scheduler.get("prediction_type", "epsilon")),
    }
    return file, tensors, beside | metadata


DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)


def diffusers_weights(folder: str) -> str:
    """The UNet weights file of a diffusers folder; raises FrugalError when there is none."""
    for name in DIFFUSERS_WEIGHTS:
        path = os.path.join(folder, "unet", name)
        if os.path.isfile(path):
            return path
    raise FrugalError(
        f"the folder {os.path.basename(folder)} has no UNet weights under unet/",
        " or ".join(DIFFUSERS_WEIGHTS),
        "copy the unet folder of stable-diffusion-inpainting there",
    )


def _read_json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    return read_object(Path(path))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def canonical_unet(
    tensors: Mapping[str, torch.Tensor], file: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors in LDM names without cross-attention, UNetModel arguments) of a try-on UNet."""
    naming, names = catvton.unet_names(tensors, file)
    unet = {new: tensors[old] for old, new in names.items()}
    first = unet["input_blocks.0.0.weight" if naming == "ldm" else "conv_in.weight"]
    catvton.variant(first.shape[1], file)
    if naming == "diffusers":
        table = comfy.utils.unet_to_diffusers(catvton.unet_config(shapes_of(unet), file))
        unknown = sorted(unet.keys() - table.keys())
        if unknown:
            raise FrugalError(
                f"{file} has {len(unknown)} unknown tensors, the first '{unknown[0]}'",
                "a diffusers UNet of SD 1.5",
                catvton.GET_BASE,
            )
        unet = {table[name]: tensor for name, tensor in unet.items()}
    try:
        config = detect_unet_config(with_context_width(unet), "")
    except (KeyError, IndexError) as error:
        raise FrugalError(
            f"{file} is incomplete ({type(error).__name__} at {error})",
            "every tensor of an SD 1.5 UNet",
            catvton.GET_BASE,
        ) from error
    # These two tell SD 1.5 from SDXL and SD 2, whose head counts and text widths differ.
    if config.get("adm_in_channels") is not None or config["use_linear_in_transformer"]:
        raise FrugalError(
            f"{file} is an inpainting UNet of SDXL or SD 2 (width {config['model_channels']})",
            "one of SD 1.5",
            catvton.GET_BASE,
        )
    return {name: t for name, t in unet.items() if ".attn2." not in name}, config


def with_context_width(unet: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors plus empty `attn2.to_k` where there are none: core's detection reads their
    width.
    """
    complete, query = dict(unet), ".attn1.to_q.weight"
    for name, tensor in unet.items():
        if name.endswith(query):
            key = name.removesuffix(query) + ".attn2.to_k.weight"
            complete.setdefault(key, torch.empty((tensor.shape[0], SD15_CONTEXT), device="meta"))
    return complete


def merge_attention(
    unet: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    attention: Mapping[str, torch.Tensor],
    file: str,
) -> dict[str, torch.Tensor]:
    """The UNet with its self-attention replaced by the attention file's; nothing is copied, and
    what declared a replaced weight to be quantised goes with it.
    """
    order = catvton.attention_order(comfy.utils.unet_to_diffusers(dict(config)))
    table = catvton.attention_map(shapes_of(attention), shapes_of(unet), order, file)
    replaced = {name.rpartition(".")[0] for name in table.values()}
    kept = {
        name: tensor
        for name, tensor in unet.items()
        if name.rpartition(".")[0] not in replaced
        or name.rpartition(".")[2] not in (precision.SCALE, precision.DECLARATION)
    }
    return kept | {table[name]: tensor for name, tensor in attention.items()}


def quantise(
    unet: dict[str, torch.Tensor], target: str, file: str
) -> tuple[dict[str, torch.Tensor], dict[str, precision.Layer]]:
    """(tensors, quantised layers): those the file declares and, for a target other than AS_STORED,
    every other wanted layer quantised on ComfyUI's device, with progress. `unet` is emptied, so
    that what is quantised can leave memory.
    """
    layers = precision.declared(unet, file)
    check_numbers(unet, layers, file)
    kinds = {target, *(layer.kind for layer in layers.values())}
    if precision.FP8 in kinds:
        device = comfy.model_management.get_torch_device()
        need_float8(device, f"{file} is to be in fp8", "choose int8, or an unquantised file")
    if target == precision.AS_STORED:
        return dict(unet), layers
    other = [layer.format for layer in layers.values() if layer.kind != target]
    if other:
        raise FrugalError(
            f"{file} already holds {len(other)} layers in {other[0]}",
            f"fp32, fp16 or bf16 weights to quantise to {target}",
            f"set quantize to '{precision.AS_STORED}', or use an unquantised file",
        )
    fresh = precision.plan(shapes_of(unet), target)
    fresh = {name: layer for name, layer in fresh.items() if name not in layers}
    progress = comfy.utils.ProgressBar(len(fresh))
    device, made = comfy.model_management.get_torch_device(), {}
    for name, tensor in precision.quantise(unet, fresh, device=device, where=file):
        made[name] = tensor
        if name.endswith(f".{precision.DECLARATION}"):
            progress.update(1)
    return made, layers | fresh


def build(
    state_dict,
    layers,
    config,
    heads: int,
    prediction: str,
    weight_dtype: str,
    disable_dynamic,
    file,
):
    """A ModelPatcher from canonical tensors, those of `layers` quantised; every tensor must land
    and none may be left over.
    """
    model_config = CatVTONConfig(config)
    model_config.unet_config["num_heads"] = heads
    model_config.prediction = ModelType.V_PREDICTION if prediction == "v" else ModelType.EPS
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtypes = list(model_config.supported_inference_dtypes)
    dtype = DTYPES.get(weight_dtype) or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=dtypes,
        weight_dtype=comfy.utils.weight_dtype(floats_of(state_dict, layers)),
    )
    if layers and weight_dtype == "auto" and dtype == torch.float32:
        # A device that computes in fp32 would double what quantising just saved.
        dtype = torch.float16
    cast = management.unet_manual_cast(dtype, load_device, dtypes)
    place = known(model_config.set_inference_dtype, device=load_device)
    model_config.set_inference_dtype(dtype, cast, **place)
    model = model_config.get_model(state_dict, "")
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    if layers:
        from . import quantized_layers  # some ComfyUI versions have no quantised tensors

        quantized_layers.install(model.diffusion_model, layers, dtype, cast or dtype, load_device)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    try:
        missing, unexpected = model.diffusion_model.load_state_dict(
            state_dict, strict=False, assign=dynamic
        )
    except RuntimeError as error:
        raise FrugalError(
            f"{file} contradicts its own structure ({str(error).splitlines()[-1].strip()})",
            "consistent shapes",
            catvton.GET_BASE,
        ) from error
    if missing or unexpected:
        wrong = [f"lacks {len(missing)} tensors ('{missing[0]}')"] if missing else []
        wrong += [f"has {len(unexpected)} unknown ones ('{unexpected[0]}')"] if unexpected else []
        raise FrugalError(
            f"{file} {' and '.join(wrong)}",
            "an SD 1.5 inpainting UNet, complete, quantised in no way but the pack's own",
            catvton.GET_BASE,
        )
    return patcher


def check_numbers(
    unet: Mapping[str, torch.Tensor], layers: Mapping[str, precision.Layer], file: str
) -> None:
    """Raises FrugalError for whole numbers that no declaration gives a scale."""
    for name, tensor in floats_of(unet, layers).items():
        if not tensor.is_floating_point():
            raise FrugalError(
                f"{file} stores '{name}' as {str(tensor.dtype).removeprefix('torch.')} without "
                "saying how it is quantised",
                "floats, or layers that 'Save CatVTON' quantised",
                catvton.GET_BASE,
            )


def floats_of(
    state_dict: Mapping[str, torch.Tensor], layers: Mapping[str, precision.Layer]
) -> dict[str, torch.Tensor]:
    """The tensors that are not quantised."""
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }


def load_catvton(
    base: str,
    attention: str | None,
    weight_dtype: str = "auto",
    quantize: str = precision.AS_STORED,
    disable_dynamic: bool = False,
):
    """ModelPatcher of a try-on UNet from paths, with its LoadReport attached under REPORT_KEY.

    base: safetensors or checkpoint file, or diffusers folder. attention: CatVTON attention file,
    None when the base is already merged. weight_dtype: "auto" (core's choice), "fp32", "fp16",
    "bf16"; of quantised models that of the remaining weights, where "auto" keeps 16 bits. quantize:
    one of `precision.CHOICES`. Raises FrugalError for any file that is not fully understood.
    """
    start = time.perf_counter()
    file, tensors, metadata = read_base(base)
    name = os.path.basename(base)
    unet, config = canonical_unet(tensors, name)
    widths = [t.shape[0] for key, t in unet.items() if key.endswith(".attn1.to_q.weight")]
    heads = catvton.head_count(metadata, widths, name)
    prediction = catvton.prediction_type(metadata, tensors, name)
    kind = catvton.variant(config["in_channels"], name)
    notes = [f"{kind}, {heads} attention heads, {prediction} prediction, cross-attention skipped"]
    if "num_heads" not in metadata and config["model_channels"] != SD15_WIDTH:
        notes.append("the file does not name its number of attention heads: 8 assumed")
    outside = len(tensors) - len(catvton.unet_names(tensors, name)[1])
    if outside:
        notes.append(f"{outside} tensors of other parts (text encoder, VAE) left in the file")
    files, licence = {name: os.path.getsize(file)}, metadata.get("frugal.licence", "")
    if attention is not None:
        label = os.path.basename(attention)
        weights, own = read_file(attention)
        unet = merge_attention(unet, config, weights, label)
        files[label] = os.path.getsize(attention)
        licence = own.get("frugal.licence", WEIGHTS_LICENCE)
        notes.append(f"self-attention of {len(widths)} blocks taken from {label}")
    elif any(".attn2." in key for key in tensors):
        notes.append(
            "no attention file and a base with cross-attention: unless CatVTON's attention is "
            "merged into it, this is a plain inpainting model that dresses nobody"
        )
    # What lies in memory and not in a mapped file is let go as it is quantised.
    del tensors
    unet, layers = quantise(unet, quantize, name)
    if layers:
        kernels = sum(layer.ndim == 4 for layer in layers.values())
        found = ", ".join(sorted({layer.format for layer in layers.values()}))
        notes.append(
            f"{len(layers) - kernels} matrices and {kernels} convolutions in 8 bits ({found})"
            + ("" if quantize == precision.AS_STORED else ", quantised while loading")
        )
    elif quantize != precision.AS_STORED:
        notes.append(f"no layer is large enough to be worth {quantize}: loaded as stored")
    args = (layers, config, heads, prediction, weight_dtype, disable_dynamic, name)
    patcher = build(unet, *args)
    report = LoadReport(
        title=f"CatVTON try-on UNet from {name}",
        files=files,
        formats=weight_bytes(patcher.model.diffusion_model),
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
        licence=licence,
    )
    patcher.set_attachments(REPORT_KEY, report)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (load_catvton, (base, attention, weight_dtype, quantize))
    return patcher


def weight_bytes(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of a module's parameters by dtype name; the scales of quantised ones by their own."""
    found: dict[str, int] = {}
    for parameter in module.parameters():
        parts: Any = [parameter]
        if hasattr(parameter, "_qdata"):
            from . import quantized_layers

            parts = quantized_layers.stored_tensors(parameter).values()
        for part in parts:
            kind = str(part.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + part.nbytes
    return found
