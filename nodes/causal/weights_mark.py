"""What tells the weights of one MODEL, with its patches, from those of another of equal shape."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ...kernels.report import LoadReport
from .._comfy import REPORT_KEY

# Values taken of each tensor: another file, or another strength, differs in any of them.
SAMPLES = 8


def weights_of(patcher: Any) -> dict[str, str]:
    """`name`, for people, and `mark` of a ModelPatcher that is loaded. Weights with patches are
    told by the patches: whether they are merged at this moment depends on where they lie.
    """
    network = patcher.model.diffusion_model
    digest = hashlib.sha256()
    patched = {key if isinstance(key, str) else key[0] for key in patcher.patches}
    plain = [
        (name, value)
        for name, value in (*network.named_parameters(), *network.named_buffers())
        if f"diffusion_model.{name}" not in patched
    ]
    _add(digest, plain)
    for key in sorted(patcher.patches, key=str):
        for strength, patch, strength_model, *_ in patcher.patches[key]:
            digest.update(f"{key} {strength:.6g} {strength_model:.6g}".encode())
            _add(digest, list(_tensors(patch)))
    unmerged = 0
    for name, value in sorted(patcher.object_patches.items()):
        layers = list(_tensors(value)) if name.startswith("diffusion_model.") else []
        unmerged += bool(layers)
        _add(digest, [(f"{name} {place}", tensor) for place, tensor in layers])
    report = patcher.get_attachment(REPORT_KEY)
    named = isinstance(report, LoadReport)
    name = ", ".join(report.files) if named else type(patcher.model).__name__
    if patched or unmerged:
        name += f" with LoRAs on {len(patched) + unmerged} layers"
    return {"name": name, "mark": digest.hexdigest()[:12]}


def _add(digest: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Names, shapes and a few values, read off the device at once."""
    values: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        held = getattr(tensor, "_qdata", tensor)
        if held.device.type == "meta" or not held.numel():
            continue
        flat = held.detach().reshape(-1) if held.is_contiguous() else held.detach().flatten()
        few = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        values.setdefault(held.device, []).append(few.to(torch.float64))
    for parts in values.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())


def _tensors(value: Any, place: str = "", depth: int = 4):
    """Tensors in nested containers and in the plain attributes of objects, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif depth and isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{place}.{number}", depth - 1)
    elif depth and isinstance(value, dict):
        for name, each in value.items():
            yield from _tensors(each, f"{place}.{name}", depth - 1)
    elif depth and not isinstance(value, (type, torch.nn.Module)) and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), place, depth - 1)
