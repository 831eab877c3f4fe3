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
from comfy.weight_adapter import LoRAAdapter

from ...kernels.checkpoints.source import check_file
from ...kernels.errors import FrugalError
from ...kernels.lora.names import BIAS, MAGNITUDE, ending, parameter_key, spelling, spellings
from ...kernels.lora.scale import StatedScale, stated_scale

PREFIX = "diffusion_model."
# Endings that hold a change itself and no factors of it; ComfyUI lets them replace factors.
DIRECT = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
# The down projection of a LoRA, in every form of ComfyUI's reader.
DOWN = (
    ".lora_down.weight", "_lora.down.weight", ".lora_A.weight", ".lora.down.weight", ".lora_A",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
# Prefixes of diffusers for the two models of a Wan 2.2 pipeline.
EXPERTS = ("transformer.", "transformer_2.")
# ComfyUI's choice of an attention kernel for a layer, JSON as bytes, from version 0.36 on.
PREFERENCE, PREFERS = ".config", "chooses an attention kernel and changes no weight, so left out"
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
    for text encoders (`others`); `scaled` counts layers whose strength the metadata state.
    """

    name: str
    entries: tuple[Entry, ...]
    unplaced: dict[str, str]
    count: int
    others: int
    scaled: int = 0


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
    return read_for(path, key_map(model), isinstance(model, comfy.model_base.WAN21))


def key_map(model: Any) -> dict[str, Any]:
    """Name in LoRA files -> name in the model's state dict, or a tuple with a part of it."""
    return comfy.lora.model_lora_keys_unet(model, {})


def read_for(path: Path, places: dict[str, Any], wan: bool = True) -> LoraFile:
    """The LoRA file at `path` for the layers of `places`, a map such as `key_map` gives. wan: any
    spelling of Wan's names counts. Raises FrugalError for a file that holds more than one LoRA, or
    states a strength that cannot be read.
    """
    check_file(path)
    held, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    tensors = comfy.lora_convert.convert_lora(held)
    stated = stated_scale(path, metadata)
    own = [name.removeprefix(PREFIX) for name in places if name.startswith(PREFIX)]
    known = spellings(own) if wan else {}
    groups: dict[str, _Group] = {}
    unplaced: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key.endswith(PREFERENCE) and tensor.dtype == torch.uint8:
            unplaced[key] = PREFERS
            continue
        whole = parameter_key(key)
        layer, place = _placed(whole, places, known)
        if layer is not None:
            group = groups.setdefault(layer, _Group(layer, place))
            group.add(path.name, key, whole.removeprefix(layer), tensor)
        elif not key.startswith(TEXT_ENCODERS):
            unplaced[key] = "no such layer in this model"
    _refuse_two_experts(path.name, groups)
    entries: list[Entry] = []
    scaled = 0
    for group in groups.values():
        try:
            scaled += group.scale(stated)
            found, left = group.entries()
            for entry in found:
                _check_ranks(entry.patch)
        except FrugalError:
            raise
        except Exception as error:  # ComfyUI's readers count on whole pairs of the right shapes
            reason = ascii(str(error))[1:-1][:120]
            raise FrugalError(
                f"{path.name}: the {len(group.raw)} tensors of {ascii(group.layer)[1:-1][:80]} do "
                f"not belong together ({type(error).__name__}: {reason})",
                "a pair of factors, and one number as alpha",
                "download the LoRA again",
            ) from error
        entries += found
        unplaced |= dict.fromkeys(left, "not read by ComfyUI")
    count = sum(not key.startswith(TEXT_ENCODERS) for key in tensors)
    return LoraFile(path.name, tuple(entries), unplaced, count, len(tensors) - count, scaled)


class _Group:
    """The tensors that a file holds for one layer under one name, by keys of ComfyUI's reader."""

    def __init__(self, layer: str, place: Any):
        self.layer, self.place = layer, place
        self.tensors: dict[str, torch.Tensor] = {}
        # Those keys -> the keys of the file; a key that is not here was made.
        self.raw: dict[str, str] = {}
        self.adapter: str | None = None

    def add(self, file: str, raw: str, text: str, tensor: torch.Tensor) -> None:
        found = ending(text)
        key = self.layer + found.text
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise FrugalError(
                f"{file}: {ascii(raw)[1:-1][:100]} holds values that are not finite",
                "finite weights",
                "download the LoRA again",
            )
        if self.adapter not in (None, found.adapter) and key in self.tensors:
            raise FrugalError(
                f"{file} holds the adapters {self.adapter!a} and {found.adapter!a} of "
                f"{ascii(self.layer)[1:-1][:80]}",
                "one adapter",
                "save each adapter as a file of its own",
            )
        self.adapter = found.adapter
        if found.text == MAGNITUDE and tensor.dim() == 1:
            tensor = tensor[:, None]
        self.tensors[key], self.raw[key] = tensor, raw

    def scale(self, stated: StatedScale) -> bool:
        """Put in the alpha that the metadata state, if any, and the bias of the up projection at
        its strength; True if metadata were used.
        """
        down = next(
            (self.tensors[key] for key in map(self.layer.__add__, DOWN) if key in self.tensors),
            None,
        )
        if down is None:
            return False
        rank, alpha = down.shape[0], self.tensors.get(f"{self.layer}.alpha")
        number = stated.alpha(self.layer, rank) if alpha is None else None
        if number is not None:
            alpha = self.tensors[f"{self.layer}.alpha"] = torch.tensor(number)
        bias = self.tensors.get(f"{self.layer}{BIAS}")
        if bias is not None and f"{self.layer}.diff_b" not in self.tensors:
            # peft scales it as it does the product; as a change of the layer's bias it is not.
            factor = 1.0 if alpha is None else float(alpha) / rank
            self.tensors[f"{self.layer}.diff_b"] = bias.float() * factor
            self.raw[f"{self.layer}.diff_b"] = self.raw.pop(f"{self.layer}{BIAS}")
            del self.tensors[f"{self.layer}{BIAS}"]
        return number is not None

    def entries(self) -> tuple[list[Entry], list[str]]:
        """The entries, and the file's keys that are in none."""
        direct = {key: value for key, value in self.tensors.items() if key.endswith(DIRECT)}
        factors = {key: value for key, value in self.tensors.items() if key not in direct}
        entries: list[Entry] = []
        left: list[str] = []
        for part in filter(None, (factors, direct)):
            found, unread = _entries(self.layer, self.place, part)
            entries += [
                Entry(e.target, e.patch, tuple(self.raw[key] for key in e.keys if key in self.raw))
                for e in found
            ]
            left += [self.raw[key] for key in unread if key in self.raw]
        return entries, left


def _check_ranks(patch: Any) -> None:
    """Raises ValueError for factors of different ranks, which ComfyUI only logs when it applies
    them, leaving the layer as it was.
    """
    if not isinstance(patch, LoRAAdapter):
        return
    up, down, _, middle = patch.weights[:4]
    if middle is None and up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of ranks {up.shape[1]} and {down.shape[0]}")


def _refuse_two_experts(file: str, groups: dict[str, _Group]) -> None:
    first = next((name for name in groups if name.startswith(EXPERTS[0])), None)
    second = next((name for name in groups if name.startswith(EXPERTS[1])), None)
    if first is not None and second is not None:
        raise FrugalError(
            f"{file} holds LoRAs for two models, {EXPERTS[0]} and {EXPERTS[1]}",
            "one LoRA",
            "save each as a file of its own, and put one on each expert",
        )


def _placed(key: str, places: dict[str, Any], known: dict[str, str]) -> tuple[str | None, Any]:
    """(the longest name of a layer that `key` starts with, what it stands for)"""
    cuts = [at for at, sign in enumerate(key) if sign == "."]
    # Old diffusers files attach the ending with an underscore.
    cuts += [at for at in (key.rfind("_lora."),) if at > 0]
    for at in sorted(cuts, reverse=True):
        name = key[:at]
        if name in places:
            return name, places[name]
        layer = known.get(spelling(name)) if known else None
        if layer is not None:
            return name, places[PREFIX + layer]
    return None, None


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
