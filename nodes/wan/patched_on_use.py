"""A MODEL with packed layers whose LoRAs change a layer's weight each time it is unpacked.

ComfyUI merges a LoRA by rounding the changed weight to the layer's own format. The few bits of a
packed layer would lose most of it, and held in 16 bits a model would take its unpacked size. So
these layers keep their words, and get the change as a function of the unpacked weight, which
ComfyUI applies in every use: resident, streamed and under dynamic VRAM alike, with one result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch

from . import packed_int


def keep_packed(patcher: Any) -> None:
    """Let a ModelPatcher, and all its clones, treat packed layers so."""
    patcher.__class__ = _kind(type(patcher))


class _Change:
    """The changes of one weight, as a function of the weight."""

    def __init__(self, key: str, patches: list[Any]):
        self.key, self.patches = key, patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return comfy.lora.calculate_weight(
            self.patches, weight, self.key, intermediate_dtype=weight.dtype
        )


@functools.cache
def _kind(base: type) -> type:
    """A class of ModelPatcher made from that of the running ComfyUI."""
    if issubclass(base, _KeepsPacked):
        return base
    return type("PackedModelPatcher", (_KeepsPacked, base), {})


class _KeepsPacked:
    """What such a ModelPatcher does before its own class."""

    model: Any
    patches: dict[str, list[Any]]
    weight_wrapper_patches: dict[str, list[Any]]
    backup: dict[str, Any]

    def clone(self, *args, **kwargs):
        # A static clone of a dynamic model is made of ComfyUI's plain class.
        made = super().clone(*args, **kwargs)  # type: ignore[misc]
        keep_packed(made)
        return made

    def load(self, device_to=None, *args, force_patch_weights=False, **kwargs):
        if force_patch_weights:
            # Older versions save what is in the layers after this.
            super().load(device_to, *args, force_patch_weights=True, **kwargs)  # type: ignore[misc]
            self._unpack_all()
            return
        with self._changed_on_use() as keys:
            super().load(device_to, *args, **kwargs)  # type: ignore[misc]
        for key in keys:
            functions = comfy.utils.get_attr(self.model, key.rpartition(".")[0]).weight_function
            if not any(isinstance(each, _Change) for each in functions):
                # Dynamic VRAM takes no function for a very small layer, whose weight it sets.
                self.patch_weight_to_device(key, device_to)  # type: ignore[attr-defined]

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)  # type: ignore[misc]
        if unpatch_weights:
            # ComfyUI leaves functions of layers in place until the next load.
            for _, module in _packed_layers(self.model):
                held = getattr(module, "weight_function", [])
                module.weight_function = [each for each in held if not isinstance(each, _Change)]

    def partially_unload(self, *args, **kwargs):
        with self._changed_on_use():
            return super().partially_unload(*args, **kwargs)  # type: ignore[misc]

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """Packed layers are saved as floats, which every loader reads."""
        made = super().model_state_dict_for_saving(model, prefix)  # type: ignore[misc]
        for name, module in _packed_layers(self.model if model is None else model):
            key = f"{name}.weight"
            for part in module.weight.state_dict(key):
                made.pop(part, None)
            made.pop(f"{name}.comfy_quant", None)
            made[key] = _lazily_unpacked(self, prefix + key, module)
        return made

    @contextmanager
    def _changed_on_use(self) -> Iterator[list[str]]:
        """With the patches of packed layers as functions in their place; the keys of these."""
        patches, functions = self.patches, self.weight_wrapper_patches
        own = [
            key for key in patches if packed_int.is_packed(comfy.utils.get_attr(self.model, key))
        ]
        changes = {key: [_Change(key, patches[key]), *functions.get(key, ())] for key in own}
        self.patches = {key: value for key, value in patches.items() if key not in changes}
        self.weight_wrapper_patches = functions | changes
        try:
            yield own
        finally:
            self.patches, self.weight_wrapper_patches = patches, functions

    def unpacked(self, key: str) -> torch.Tensor:
        """The weight named `key` with its changes, on the CPU in the compute dtype."""
        module = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        weight = module.weight.dequantize()
        if key in self.patches:
            changed = weight.to(self.load_device, torch.float32)  # type: ignore[attr-defined]
            weight = comfy.lora.calculate_weight(self.patches[key], changed, key).to(weight.dtype)
        return weight.cpu()

    def _unpack_all(self) -> None:
        for name, module in _packed_layers(self.model):
            key = f"{name}.weight"
            self.backup.setdefault(key, _Backup(module.weight, False))
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
        config = self.model.model_config
        held = self.model.diffusion_model.parameters()
        if hasattr(config, "layer_quant_config") and not any(hasattr(p, "_qdata") for p in held):
            # It has built the layers, and would be written as what they still are.
            config.layer_quant_config = None


class _Backup(NamedTuple):
    """What ComfyUI keeps of a weight that it will put back."""

    weight: torch.Tensor
    inplace_update: bool


def _packed_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if packed_int.is_packed(getattr(module, "weight", None))
    ]


def _lazily_unpacked(patcher: Any, key: str, module: Any) -> torch.Tensor:
    """A stand-in for a weight that is unpacked at the moment it is written."""

    class Unpacked(comfy.model_patcher.LazyCastingParam):
        def to(self, *args, **kwargs):
            return self.model.unpacked(self.key)

    shape, dtype = (module.out_features, module.in_features), packed_int.compute_dtype(module)
    return Unpacked(patcher, key, torch.empty(shape, dtype=dtype, device="meta"))
