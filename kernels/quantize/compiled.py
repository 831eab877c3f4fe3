"""comfy-kitchen's compiled kernels in a process without ComfyUI."""

from __future__ import annotations

import importlib

import torch

from ..memory.doctor import why_compiled_off


def follow_comfyui() -> str:
    """Switch them off where ComfyUI would, under a torch for a CUDA before 13, whose driver may
    lack what they need; returns why, "" if they stay on.
    """
    why = why_compiled_off(torch.version.cuda, None)
    try:
        kitchen = importlib.import_module("comfy_kitchen")
    except ImportError:
        return why
    if why:
        kitchen.registry.disable("cuda")
    return why
