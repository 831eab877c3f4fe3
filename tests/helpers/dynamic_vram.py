"""ComfyUI's dynamic VRAM on the CPU, as far as a layer and a model can tell.

The library behind it needs a card. Its parts in Python do not: here they are given buffers of main
memory, so that what ComfyUI itself does to lazy layers, buffers and patched weights is what runs.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def needed() -> Any:
    """comfy.memory_management, or the test is skipped: this ComfyUI has no dynamic VRAM."""
    memory = pytest.importorskip("comfy.memory_management")
    if not hasattr(comfy.ops, "resolve_cast_module_with_vbar"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    return memory


@contextmanager
def lazy_layers():
    """Models that are built inside have linear layers without tensors until a state dict comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needed(), "aimdo_enabled", True)
        # The reader that goes with it maps files through the library.
        patch.setattr(comfy.utils, "load_safetensors", _read)
        yield


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata() or {}


def restore_buffers(patcher: Any, kept: dict[str, Any]) -> None:
    """What loading does to buffers after a ModelPatcher exchanged its objects: those that were
    kept come back by name, and the present ones are kept.
    """
    for key in list(kept):
        comfy.utils.set_attr_buffer(patcher.model, key, kept.pop(key))
    for key, buffer in patcher.model.named_buffers():
        kept[key] = buffer
        comfy.utils.set_attr_buffer(patcher.model, key, buffer.clone())


@contextmanager
def streamed(patcher: Any, resident: bool):
    """Inside, layers get weights as they do on a card. resident: each has a place of its own, in
    which a patched weight stays; else all go through a buffer at each use.
    """
    memory = needed()
    held: dict[Any, Any] = {}
    layers = {
        name: module
        for name, module in patcher.model.named_modules()
        if hasattr(module, "comfy_cast_weights") and hasattr(module, "weight")
    }

    def cast(s, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False,
             compute_dtype=None, want_requant=False):  # fmt: skip
        if input is not None:
            quantised = isinstance(input, comfy.ops.QuantizedTensor)
            dtype = dtype or (input.params.orig_dtype if quantised else input.dtype)
        bias_dtype = bias_dtype or dtype
        parts = [s.weight, s.bias]
        if s not in held:
            buffer = torch.empty(memory.vram_aligned_size(parts), dtype=torch.uint8)
            for given, place in zip(
                parts, memory.interpret_gathered_like(parts, buffer), strict=True
            ):
                if given is not None:
                    place.copy_(given.data)
            s._prefetch = {
                "signature": object() if resident else None, "resident": False,
                "xfer_dest": buffer, "cast_dest": None, "needs_cast": False,
                "cast_geometry": parts,
            }  # fmt: skip
            if resident:
                held[s] = buffer
        else:
            s._prefetch = {"signature": object(), "resident": True}
        found = comfy.ops.resolve_cast_module_with_vbar(
            s, dtype, input.device if device is None else device, bias_dtype, compute_dtype,
            want_requant,
        )  # fmt: skip
        del s._prefetch
        return (*found, (None, None, None)) if offloadable else found

    # As a model with packed layers is loaded.
    with patcher._changed_on_use() if hasattr(patcher, "_changed_on_use") else nullcontext():
        patches, functions = patcher.patches, patcher.weight_wrapper_patches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", cast)
        for name, module in layers.items():
            patch.setattr(module, "comfy_cast_weights", True)
            patch.setattr(module, "seed_key", name, raising=False)
            for suffix in ("weight", "bias"):
                key, given = f"{name}.{suffix}", None
                if key in patches:
                    given = comfy.model_patcher.LowVramPatch(key, patches)
                patch.setattr(module, f"{suffix}_lowvram_function", given, raising=False)
                patch.setattr(module, f"{suffix}_function", functions.get(key, []), raising=False)
        try:
            yield
        finally:
            for module in held:
                for name in ("_v_weight", "_v_bias", "_v_signature"):
                    vars(module).pop(name, None)
