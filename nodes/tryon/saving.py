"""A try-on MODEL as one file that 'Load CatVTON' reads back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy_api.v0_0_2 import io, ui

from ...kernels.checkpoints import catvton
from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from ...kernels.tensor_file import write_tensors
from ...kernels.tryon import precision
from .._comfy import REPORT_KEY, found_by, show_text
from .._output import free_number, prefix_problem
from . import common_inputs
from .unet import CatVTONConfig

PREFIX = "diffusion_model."
SUFFIX = ".safetensors"


def tensors_of(patcher: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a try-on UNet by canonical name, on the CPU: patches such as a LoRA are
    merged, with the rounding that ComfyUI gives them when it loads the model.

    Raises FrugalError for a MODEL of another kind, and for changes that are no weights.
    """
    if not isinstance(getattr(patcher.model, "model_config", None), CatVTONConfig):
        raise FrugalError(
            f"the model is a {type(patcher.model).__name__} of another loader",
            "a try-on UNet",
            "connect the MODEL of 'Load CatVTON'",
        )
    for found, kind in (
        ([name for name in patcher.object_patches if name.startswith(PREFIX)], "replaced modules"),
        (list(patcher.weight_wrapper_patches), "wrapped weights"),
        (list(patcher.injections), "injected layers"),
        (list(patcher.hook_patches), "hooks"),
    ):
        if found:
            raise FrugalError(
                f"the model has {len(found)} {kind}",
                "patches of weights, which can be merged",
                "connect the MODEL from before the node that adds them",
            )
    made: dict[str, torch.Tensor] = {}
    for path, module in patcher.model.diffusion_model.named_modules():
        for suffix, held in module.named_parameters(recurse=False):
            name = f"{path}.{suffix}"
            key, layer = PREFIX + name, _quantised_layer(held, module)
            # What is loaded may be merged already; ComfyUI keeps the untouched weight then.
            backup = patcher.backup.get(key)
            weight = held if backup is None else backup.weight
            if key in patcher.patches:
                weight = _merged(patcher, key, weight, module, suffix)
            made |= {name: weight} if layer is None else _leaves(path, weight, layer)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in made.items()}


def _quantised_layer(weight: torch.Tensor, module: Any) -> precision.Layer | None:
    if not hasattr(weight, "_qdata"):
        return None
    from . import quantized_layers  # some ComfyUI versions have no quantised tensors

    return quantized_layers.layer_of(module)


def _leaves(path: str, weight: Any, layer: precision.Layer) -> dict[str, torch.Tensor]:
    from . import quantized_layers

    own = quantized_layers.stored_tensors(weight) | {precision.DECLARATION: layer.declaration()}
    return {f"{path}.{suffix}": tensor for suffix, tensor in own.items()}


def _merged(patcher: Any, key: str, weight: Any, module: Any, suffix: str) -> Any:
    convert = getattr(module, f"convert_{suffix}", None)
    # A copy that the patches may write to, in the type that they are computed in.
    wide = weight.to(device="cpu", dtype=torch.float32, copy=True)
    wide = convert(wide, inplace=True) if convert is not None else wide
    changed = comfy.lora.calculate_weight(patcher.patches[key], wide, key)
    seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    give = getattr(module, f"set_{suffix}", None)
    if give is not None:
        return give(changed, inplace_update=False, seed=seed(key), return_weight=True)
    return comfy.float.stochastic_rounding(changed, weight.dtype, seed=seed(key))


def metadata_of(patcher: Any, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What the loader needs and tensors cannot tell, and the licence that came with the weights."""
    config, report = patcher.model.model_config, patcher.attachments.get(REPORT_KEY)
    layers = precision.declared(tensors, "the model")
    v = patcher.model.model_type == ModelType.V_PREDICTION
    made = {
        "num_heads": str(config.unet_config["num_heads"]),
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.title": "CatVTON try-on UNet",
        "frugal.variant": catvton.variant(config.unet_config["in_channels"], "the model"),
    }
    formats = sorted({layer.format for layer in layers.values()})
    if formats:
        made["frugal.quantization"] = ", ".join(formats)
    if report is not None and report.licence:
        made["frugal.licence"] = report.licence
    return made


def save_catvton(patcher: Any, path: str) -> str:
    """Write a try-on MODEL to `path`, whole or not at all; returns a report."""
    tensors = tensors_of(patcher)
    metadata = metadata_of(patcher, tensors)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_tensors(Path(path), tensors, metadata)
    lines = [f"{os.path.basename(path)}: {megabytes(os.path.getsize(path))}"]
    lines += [f"{len(patcher.patches)} patched weights merged"] if patcher.patches else []
    wrappers = [key for kind in patcher.wrappers.values() for key in kind if kind[key]]
    if wrappers:
        lines.append(
            f"note: {len(wrappers)} wrappers ({ascii(wrappers[0])[:60]} ...) are no weights "
            "and are not in the file"
        )
    lines += [f"{name}: {value}" for name, value in metadata.items()]
    if "frugal.quantization" in metadata:
        lines.append("read by 'Load CatVTON' alone: ComfyUI has no quantised convolutions")
    return "\n".join(lines)


class FrugalSaveCatVTON(io.ComfyNode):
    """The try-on UNet as one file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalSaveCatVTON",
            display_name="Save CatVTON",
            category=common_inputs.FAMILY,
            description=(
                "Saves a try-on MODEL, its attention merged and quantised or not, as one file for "
                "'Load CatVTON'. Its LoRAs are merged; the file loads faster and takes less disk "
                "space."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of 'Load CatVTON'."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/catvton",
                    tooltip="Name under ComfyUI's output folder; a number is added. In "
                    "output/diffusion_models the loader finds it.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=("Where the file is and what it contains."),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["catvton", "try-on", "export", "quantize"]),
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem("", filename_prefix)

    @classmethod
    def execute(cls, model, filename_prefix):
        folder, name, count, subfolder = free_number(filename_prefix)
        file = f"{name}_{count:05}_{SUFFIX}"
        text = save_catvton(model, os.path.join(folder, file))
        text = f"output/{subfolder}/{text}" if subfolder else f"output/{text}"
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [FrugalSaveCatVTON]
