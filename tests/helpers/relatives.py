"""Tiny models of the classes that ComfyUI has for relatives of Wan, as files of them would be."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.ops
import torch

from frugal.tests.helpers import wan as bed

SIZE = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "out_dim": 16}
# Name in the report -> (module of comfy.ldm.wan, class, what else it is built with).
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "2.2 S2V": ("model", "WanModel_S2V", {}),
    "HuMo": ("model", "HumoWanModel", {"in_dim": 36}),
    "Animate": ("model_animate", "AnimateWanModel", {"in_dim": 36, "num_layers": 5}),
    "SCAIL": ("model", "SCAILWanModel", {"in_dim": 20}),
    "SCAIL 2": ("model", "SCAIL2WanModel", {"in_dim": 20}),
    "Dancer": ("model_wandancer", "WanDancerModel", {"in_dim": 36}),
}


def network(label: str) -> torch.nn.Module | None:
    """The class with random weights, fp32; None where the running ComfyUI has no such class."""
    module, name, more = CLASSES[label]
    try:
        found = importlib.import_module(f"comfy.ldm.wan.{module}")
    except ModuleNotFoundError:
        return None
    if not hasattr(found, name):
        return None
    # These layers make their weights in every mode of ComfyUI.
    return getattr(found, name)(**{**SIZE, **more}, operations=_Ops)


class _Ops(comfy.ops.manual_cast):
    Linear = torch.nn.Linear
    Embedding = torch.nn.Embedding


def weights(model: torch.nn.Module) -> bed.Weights:
    """Small seeded values for all that a file of the model holds."""
    make = torch.Generator().manual_seed(4)
    kept = {name for name, _ in model.named_buffers()}
    return {
        name: tensor.clone()
        if name in kept
        else torch.randn(tensor.shape, generator=make) / max(1, tensor[0].numel()) ** 0.5
        if tensor.dim() > 1
        else 0.1 * torch.randn(tensor.shape, generator=make)
        for name, tensor in model.state_dict().items()
    }


def linears(model: torch.nn.Module, blocks: bool = True) -> list[str]:
    """Its linear layers, those of the blocks only or all of them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (name.startswith("blocks.") or not blocks)
    ]
