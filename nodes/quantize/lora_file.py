"""Reading a LoRA file with ComfyUI's own readers, one layer at a time, and nothing lost silently.

ComfyUI's reader knows every kind of adapter, but only logs what it does not place, lets one of two
entries for a layer replace the other, and lacks several names of Wan layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.utils
import torch

from ...kernels.quant.lora_names import aliases

PREFIX = "diffusion_model."
# Endings that hold a change itself and no factors of it; ComfyUI lets them replace factors.
DIRECT = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
TEXT_ENCODERS = ("lora_te", "text_encoder", "te1_", "te2_", "cond_stage_model", "clip_l.")


@dataclass(frozen=True)
class Entry:
    """One change of one parameter: `target` as ComfyUI's add_patches takes it, `patch` a
    WeightAdapterBase or (kind, tensors), `keys` of the file.
    """

    target: Any
    patch: Any
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The parameter in the model's state dict."""
        return self.target if isinstance(self.target, str) else self.target[0]

    @property
    def part(self) -> tuple[int, int, int] | None:
        """(axis, start, length) where only a part of the parameter changes."""
        return None if isinstance(self.target, str) else self.target[1]


@dataclass(frozen=True)
class LoraFile:
    """Entries, `unplaced` key -> reason, how many keys the file has for this model (`count`), and
    for text encoders (`others`).
    """

    name: str
    entries: tuple[Entry, ...]
    unplaced: dict[str, str]
    count: int
    others: int


class _Watched(dict):
    """A dict that knows which of its entries were read."""

    def __init__(self, content: dict[str, torch.Tensor]):
        super().__init__(content)
        self.used: dict[str, None] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        self.used[key] = None
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.used[key] = None
        return super().get(key, default)


def read(path: Path, model: Any) -> LoraFile:
    """The LoRA file at `path` for `model`, a ComfyUI BaseModel."""
    return read_for(path, key_map(model))


def read_for(path: Path, places: dict[str, Any]) -> LoraFile:
    """The LoRA file at `path` for the layers of `places`, a map such as `key_map` gives."""
    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path)))
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    unplaced: dict[str, str] = {}
    for key, tensor in tensors.items():
        layer = _layer(key, places)
        if layer is not None:
            grouped.setdefault(layer, {})[key] = tensor
        elif not key.startswith(TEXT_ENCODERS):
            unplaced[key] = "no such layer in this model"
    entries: list[Entry] = []
    for layer, content in grouped.items():
        direct = {key: value for key, value in content.items() if key.endswith(DIRECT)}
        factors = {key: value for key, value in content.items() if key not in direct}
        for part in filter(None, (factors, direct)):
            found, left = _entries(layer, places[layer], part)
            entries += found
            unplaced |= dict.fromkeys(left, "not read by ComfyUI")
    count = sum(not key.startswith(TEXT_ENCODERS) for key in tensors)
    return LoraFile(path.name, tuple(entries), unplaced, count, len(tensors) - count)


def key_map(model: Any) -> dict[str, Any]:
    """Name in LoRA files -> name in the model's state dict, or a tuple with a part of it."""
    places = comfy.lora.model_lora_keys_unet(model, {})
    if isinstance(model, comfy.model_base.WAN21):
        for name in model.state_dict():
            if name.startswith(PREFIX) and name.endswith(".weight"):
                layer = name[len(PREFIX) : -len(".weight")]
                for alias in aliases(layer):
                    places.setdefault(alias, name)
    return places


def _layer(key: str, places: dict[str, Any]) -> str | None:
    """The longest name of a layer that `key` starts with."""
    cuts = [at for at, sign in enumerate(key) if sign == "."]
    # Old diffusers files attach the ending with an underscore.
    cuts += [at for at in (key.rfind("_lora."),) if at > 0]
    return next((key[:at] for at in sorted(cuts, reverse=True) if key[:at] in places), None)


def _entries(
    layer: str, place: Any, content: dict[str, torch.Tensor]
) -> tuple[list[Entry], list[str]]:
    watched = _Watched(content)
    patches = comfy.lora.load_lora(watched, {layer: place}, log_missing=False)
    if not patches:
        return [], list(content)
    found = []
    for target, patch in patches.items():
        used = tuple(watched.used)
        if len(patches) > 1:
            # A weight and its bias, each with a key of its own.
            bias = isinstance(target, str) and target.endswith(".bias")
            used = tuple(key for key in used if key.endswith((".diff_b", ".b_norm")) == bias)
        found.append(Entry(target, patch, used))
    return found, [key for key in content if key not in watched.used]
