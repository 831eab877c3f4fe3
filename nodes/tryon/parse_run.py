"""A Segformer human parser from a local folder, placed and freed by ComfyUI.

The FASHN model was trained behind its own preprocessing. Where the package `fashn-human-parser` is
installed that very code prepares the photo and reads the answer; the weights still come from the
folder and stay with ComfyUI's memory management.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch

from ...kernels.checkpoints.source import check_file
from ...kernels.errors import FrugalError
from ...kernels.json_text import read_object
from ...kernels.log import LOG
from ...kernels.masks.labels import voc_palette
from ...kernels.tryon import parsing, pictures, segformer_names

KIND = "human_parsing"
PAGE = "https://huggingface.co/mattmdjaga/segformer_b2_clothes"
FASHN_PACKAGE = "fashn_human_parser"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def register_folder() -> None:
    """Make models/human_parsing a folder kind of its own."""
    folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


def choices() -> list[str]:
    """Names of the folders under models/human_parsing that hold a config.json."""
    found = set()
    for root in folder_paths.get_folder_paths(KIND):
        if os.path.isdir(root):
            found |= {
                name
                for name in os.listdir(root)
                if os.path.isfile(os.path.join(root, name, "config.json"))
            }
    return sorted(found)


def folder_of(name: str) -> str:
    """Absolute path of a `choices` entry."""
    for root in folder_paths.get_folder_paths(KIND):
        path = os.path.join(root, name)
        if name in choices() and os.path.isdir(path):
            return path
    raise FrugalError(
        f"there is no human parser '{name}'",
        "a folder with config.json and model.safetensors under models/human_parsing",
        f"put one there, such as segformer_b2_clothes from {PAGE}",
    )


def _json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    return read_object(Path(path))


class Parser(torch.nn.Module):
    """Picture to logits. ComfyUI sets `device` on what it places, which transformers forbids on its
    own classes.
    """

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values=picture).logits


def checked_weights(folder: str, file: str, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The file's tensors under the network's names. Raises FrugalError unless every tensor of the
    network is there, in its shape, and no other.
    """
    check_file(Path(folder, file))
    weights = comfy.utils.load_torch_file(os.path.join(folder, file), safe_load=True)
    wanted = network.state_dict()
    names_of = segformer_names.module_names(weights, wanted)
    weights = {names_of[name]: tensor for name, tensor in weights.items()}
    # A counter of training steps is no part of the network: no forward reads it.
    misfits = [
        name
        for name in wanted.keys() | weights.keys()
        if not name.endswith("num_batches_tracked")
        and (name not in weights or name not in wanted or weights[name].shape != wanted[name].shape)
    ]
    if misfits:
        raise FrugalError(
            f"{os.path.basename(folder)}/{file} has {len(misfits)} tensors missing, unknown or of "
            f"another shape, such as '{min(misfits)}'",
            "the weights of its config.json",
            "copy both files from the same model",
        )
    return weights


def fashn_package(folder: str):
    """The package's parser with the model of the folder on the CPU; None where it is not
    installed, or cannot be imported (told in the log).

    The folder has to hold config.json and weights: its constructor would look elsewhere for a
    folder that does not.
    """
    if importlib.util.find_spec(FASHN_PACKAGE) is None:
        return None
    try:
        from fashn_human_parser import FashnHumanParser
    except ImportError as error:
        LOG.warning("[Frugal] Human Parse reads photos without %s: %s", FASHN_PACKAGE, error)
        return None
    return FashnHumanParser(model_id=os.path.abspath(folder), device="cpu")


def load(folder: str):
    """(ModelPatcher of the network, label order, read, how) from a model folder.

    read(photo [1, H, W, 3] in 0..1) gives labels uint8 [1, H, W] once the patcher is loaded; `how`
    says in words whose preprocessing it uses. The network is built from config.json and filled
    from the weights beside it: nothing is fetched. Raises FrugalError for another kind of model or
    weights that do not fit.
    """
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config, base = _json(folder, "config.json"), os.path.basename(folder)
    if config.get("model_type") != "segformer":
        raise FrugalError(
            f"{base} is a model of the kind '{config.get('model_type')}'",
            "segformer",
            "use a Segformer parser such as segformer_b2_clothes or fashn-human-parser",
        )
    file = next((f for f in WEIGHTS if os.path.isfile(os.path.join(folder, f))), None)
    if file is None:
        raise FrugalError(
            f"the folder {base} has no weights",
            " or ".join(WEIGHTS),
            "copy the weights into the folder",
        )
    names = {int(number): name for number, name in config.get("id2label", {}).items()}
    order = parsing.label_order(names)
    network = SegformerForSemanticSegmentation(SegformerConfig(**config)).eval()
    weights = checked_weights(folder, file, network)
    package = fashn_package(folder) if order.body else None
    if package is not None:
        network = package.model
    network.load_state_dict(weights, strict=False)
    management = comfy.model_management
    patcher = comfy.model_patcher.ModelPatcher(
        Parser(network.float()),
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )
    if package is not None:
        package.device = patcher.load_device
        return patcher, order, _reader_of(package), f"prepared by {FASHN_PACKAGE}"
    preprocess = parsing.Preprocess.read(_json(folder, "preprocessor_config.json"))

    def read(photo: torch.Tensor) -> torch.Tensor:
        ready = preprocess(photo.to(patcher.load_device))
        return parsing.labels_of(patcher.model(ready), (photo.shape[1], photo.shape[2]))

    width, height = preprocess.size[::-1]
    return patcher, order, read, f"prepared at {width} x {height} px as preprocessor_config.json"


def _reader_of(package) -> Callable[[torch.Tensor], torch.Tensor]:
    """`load`'s read through the package: from RGB bytes [H, W, 3] to labels [H, W]."""

    def read(photo: torch.Tensor) -> torch.Tensor:
        levels = (photo[0] * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return torch.from_numpy(package.predict(levels).astype(np.uint8))[None]

    return read


def parse(folder: str, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str, str]:
    """(labels uint8 [B, H, W], body uint8 [B, H, W] in DensePose's numbers, name of the map, how
    the photo was prepared).

    body is 0 everywhere if the parser does not tell hands, feet and skin apart.
    """
    patcher, order, read, how = load(folder)
    photo = pictures.as_rgb(image, "image")
    comfy.model_management.load_models_gpu([patcher])
    bar = comfy.utils.ProgressBar(photo.shape[0])
    found = []
    with torch.no_grad():
        for i in range(photo.shape[0]):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(read(photo[i : i + 1]).cpu())
            bar.update(1)
    raw = torch.cat(found)
    if int(raw.max()) >= len(order.labels):
        raise FrugalError(
            f"the parser gives the label {int(raw.max())}",
            f"0 to {len(order.labels) - 1} as named in its config.json",
            "use the config.json that belongs to the weights",
        )
    body = parsing.renumber(raw, order.body) if order.body else torch.zeros_like(raw)
    return parsing.renumber(raw, order.labels), body, order.map, how


def overlay(image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The photo with each label's colour (PASCAL VOC palette) laid over it by half; 0 stays."""
    palette = voc_palette(256).astype(np.float32) / 510
    shown = pictures.as_rgb(image, "image").to("cpu", torch.float32, copy=True).numpy()
    for photo, frame in zip(shown, labels.numpy(), strict=True):
        for number in np.unique(frame[frame > 0]):
            there = frame == number
            photo[there] = photo[there] / 2 + palette[number]
    return torch.from_numpy(shown)
