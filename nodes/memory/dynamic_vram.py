"""ComfyUI's dynamic VRAM, and a limit to what a model's weights take of the device under it.

There a weight comes to the device when its layer runs, into a range of addresses of its model (a
ModelVBAR of comfy-aimdo) whose pages give way when other memory is needed. ComfyUI asks no model to
make room for another one, and no number that it takes from a model limits its weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch

# Of comfy-aimdo's memory, which tells it to nobody.
PAGE = 32 << 20
STATIC = (
    "planned for ComfyUI without dynamic VRAM: weights for which there is no room stay in main "
    "memory"
)
LIMITED = (
    "planned for ComfyUI with dynamic VRAM: a budget that is typed in limits the weights on the "
    "device, in steps of 32 MiB; other models are unloaded"
)
FREE = (
    "planned for ComfyUI with dynamic VRAM: ComfyUI decides how much of the device the weights "
    "take, as its comfy-aimdo has no limit for them (ModelVBAR.set_watermark); the budget only "
    "chooses the memory options"
)


def is_dynamic(patcher: Any) -> bool:
    """Whether the weights of this ModelPatcher are under dynamic VRAM."""
    ask = getattr(patcher, "is_dynamic", None)
    return ask is not None and bool(ask())


def can_limit() -> bool:
    """Whether the installed comfy-aimdo has a limit. `set_watermark_limit` is none: below it the
    pages of a model do not give way.
    """
    module = sys.modules.get("comfy_aimdo.model_vbar")
    return hasattr(getattr(module, "ModelVBAR", None), "set_watermark")


def note(patcher: Any) -> str:
    """What a budget means for this ModelPatcher."""
    if not is_dynamic(patcher):
        return STATIC
    return LIMITED if can_limit() else FREE


def size(patcher: Any) -> int:
    """Bytes that the weights of this ModelPatcher take on the device. Under dynamic VRAM they have
    the file's types in main memory, and those that the model wants on the device.
    """
    total = int(patcher.model_size())
    if is_dynamic(patcher):
        for module in patcher.model.modules():
            for name, weight in module.named_parameters(recurse=False):
                total += weight.numel() * (dtype_of(module, name).itemsize - weight.itemsize)
    return total


def dtype_of(module: torch.nn.Module, name: str) -> torch.dtype:
    """The type in which a weight of `module` is loaded; a quantised one has that of its values."""
    weight = getattr(module, name)
    quantised = hasattr(weight, "_qdata")
    return (
        None if quantised else getattr(module, f"{name}_comfy_model_dtype", None)
    ) or weight.dtype


def limit(patcher: Any, most: int) -> None:
    """Keep at most `most` bytes of the weights on the device, until ComfyUI loads them again; the
    rest of them are streamed.
    """
    vbar = _vbar(patcher)
    if vbar is not None and can_limit():
        vbar.set_watermark(max(0, most) // PAGE * PAGE)


def held(patcher: Any) -> int:
    """Bytes of weights on the device that torch's allocator does not see."""
    vbar = _vbar(patcher)
    return 0 if vbar is None else int(vbar.loaded_size())


def held_on(device: torch.device) -> int:
    """The same of all models on `device`."""
    return sum(held(each) for each in _loaded(device))


def release(patcher: Any, amount: int) -> int:
    """Take `amount` bytes of weights off the device; bytes that became free."""
    if not is_dynamic(patcher):
        return int(patcher.partially_unload(patcher.offload_device, amount) or 0)
    # The patcher's own method would, for more than there is, also take what must stay in a run.
    amount = min(amount, held(patcher))
    return int(_vbar(patcher).free_memory(amount)) if amount else 0


def share(patcher: Any, room: int, buffers: int) -> None:
    """Divide `room` bytes of the device among the weights of a run of `patcher`, which is loaded.
    Models that the run does not use give way first. buffers: bytes for weights on their way, needed
    where not all of them fit.
    """
    ours = [patcher, *patcher.get_nested_additional_models()]
    wanted = sum(map(size, ours))
    for each in _loaded(patcher.load_device):
        if not any(each is one or one.is_clone(each) for one in ours):
            if is_dynamic(each):
                release(each, max(0, wanted + int(each.loaded_size()) - room))
            room -= int(each.loaded_size())
    if wanted > room:
        outside = wanted - size(patcher) + resident(patcher)
        limit(patcher, room - buffers - outside)


def resident(patcher: Any) -> int:
    """Bytes of weights that ComfyUI keeps on the device in any case, in torch's allocator."""
    return int(patcher.loaded_size()) - held(patcher)


def _loaded(device: torch.device) -> Iterator[Any]:
    for each in comfy.model_management.current_loaded_models:
        # ComfyUI holds patchers weakly.
        if each.device == device and each.model is not None:
            yield each.model


def _vbar(patcher: Any) -> Any:
    model = getattr(patcher, "model", None)
    return getattr(model, "dynamic_vbars", {}).get(patcher.load_device)
