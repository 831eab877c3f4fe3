"""Reads off models which of their weights are copied into main memory and which are mapped."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from ...kernels.checkpoints.wan_shapes import detect_config
from ...kernels.errors import FrugalError
from ...kernels.memory import fit
from ...kernels.memory.main_memory import Held, MainMemory, main_memory
from .._comfy import experts_of
from . import dynamic_vram

MAPS = Path("/proc/self/maps")


def of(model: Any, clip: Any = None) -> MainMemory | None:
    """The main memory of a run of a MODEL; None where the system does not say what is mapped."""
    files = _mapped_files()
    if files is None:
        return None
    switch = experts_of(model)
    named = {"the model": model}
    if switch is not None:
        named = {"high noise expert": switch.high, "low noise expert": switch.low}
    experts = [_held(name, each, files) for name, each in named.items()]
    encoder = None if clip is None else _held("text encoder", clip.patcher, files)
    return main_memory(experts, encoder, psutil.virtual_memory().available, _choices(model, named))


def _choices(model: Any, named: dict[str, Any]) -> dict[str, int]:
    shapes = {name: tuple(p.shape) for name, p in model.model.diffusion_model.named_parameters()}
    try:
        config = detect_config("the MODEL", shapes)
    except FrugalError:
        return {}
    if config.relative:
        return {}
    return {form: len(named) * fit.wan_bytes(config, form) for form in fit.FORMATS}


def _held(name: str, patcher: Any, files: list[tuple[int, int]]) -> Held:
    starts = [start for start, _ in files]
    seen: set[int] = set()
    copied = mapped = 0
    for tensor in _tensors(patcher.model):
        address = tensor.data_ptr()
        if tensor.device.type != "cpu" or not tensor.nbytes or address in seen:
            continue
        seen.add(address)
        at = bisect.bisect_right(starts, address) - 1
        if at >= 0 and address < files[at][1]:
            mapped += tensor.nbytes
        else:
            copied += tensor.nbytes
    own = torch.device(patcher.load_device).type not in ("cpu", "mps")
    return Held(name, copied, mapped, own and not dynamic_vram.is_dynamic(patcher))


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor of the model as it is stored, of quantised ones what they are made of."""
    for parameter in (*model.parameters(), *model.buffers()):
        data = getattr(parameter, "_qdata", None)
        yield parameter.detach() if data is None else data


def _mapped_files() -> list[tuple[int, int]] | None:
    """Ranges of addresses that are pages of files, in order; None where the system has no list."""
    try:
        lines = MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/") and not parts[5].startswith("/dev"):
            start, end = (int(part, 16) for part in parts[0].split("-"))
            found.append((start, end))
    return sorted(found)
