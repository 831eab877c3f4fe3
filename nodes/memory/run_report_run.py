"""Reads models and the device for the run report."""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfy.model_management
import torch

from ...kernels.attention.call_report import Table
from ...kernels.memory.meter import Meter
from ...kernels.memory.run_report import Frames, ModelFacts
from ...kernels.report import LoadReport
from .._comfy import ATTENTION_KEY, REPORT_KEY
from . import dynamic_vram

METER = Meter(dynamic_vram.held_on)


def device() -> torch.device:
    """The device ComfyUI computes on."""
    return comfy.model_management.get_torch_device()


def start_run() -> None:
    """The server looks at a new run: restart clock and peak memory."""
    METER.start(device())


def obtainable(device: torch.device) -> int:
    """Bytes that ComfyUI has on `device` once it has put its models away."""
    management = comfy.model_management
    free = management.get_free_memory(device)
    if device.type != "cpu":
        loaded = (each for each in management.current_loaded_models if each.device == device)
        free += sum(each.model_loaded_memory() for each in loaded)
    return int(free)


def model_facts(model: Any) -> LoadReport | ModelFacts:
    """What the loader left on the MODEL, else what can be read off the model itself."""
    left = model.get_attachment(REPORT_KEY)
    if isinstance(left, LoadReport):
        return left
    formats: Counter[str] = Counter()
    for tensor in (*model.model.parameters(), *model.model.buffers()):
        kind = type(tensor).__name__
        name = str(tensor.dtype).removeprefix("torch.")
        # A quantised tensor shows the dtype it stands for, so its class has to be named too.
        formats[name if kind in ("Tensor", "Parameter") else f"{name} ({kind})"] += tensor.nbytes
    return ModelFacts(
        type(model.model).__name__,
        str(model.model_dtype() or "an unknown dtype").removeprefix("torch."),
        int(model.model_size()),
        dict(formats.most_common()),
    )


def attention_tables(*models: Any) -> tuple[Table, ...]:
    """What attention took in the latest run of those models that have an attention node; models
    that share one count once.
    """
    left = (each.get_attachment(ATTENTION_KEY) for each in models if each is not None)
    tables = (getattr(each, "table", None) for each in left)
    return tuple({id(each): each for each in tables if isinstance(each, Table)}.values())


def frames_of(images: torch.Tensor) -> Frames:
    """Count and size of an IMAGE, [B, H, W, C]."""
    return Frames(int(images.shape[0]), int(images.shape[2]), int(images.shape[1]))
