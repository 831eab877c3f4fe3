"""Modules for a trace on torch's meta device: layers whose weights are there before any file is
read, and copies of modules that have run.
"""

from __future__ import annotations

import copy
from types import BuiltinFunctionType, FunctionType
from typing import Any

import comfy.ops
import torch

META = torch.device("meta")
PLAIN = (bool, int, float, str, type(None), type, torch.dtype, FunctionType, BuiltinFunctionType)
# What torch.nn.Module itself keeps in every instance.
OWN = frozenset(vars(torch.nn.Module()))


class MetaOps(comfy.ops.disable_weight_init):
    """ComfyUI's layers. With dynamic VRAM it leaves out the weight of a Linear until a state dict
    comes, unless the class reads state dicts in its own way.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            torch.nn.Linear._load_from_state_dict(self, *args)

    class Embedding(comfy.ops.disable_weight_init.Embedding):
        def _load_from_state_dict(self, *args: Any) -> None:
            torch.nn.Embedding._load_from_state_dict(self, *args)


def without_memory(module: torch.nn.Module) -> Any:
    """A copy of `module` on the meta device, its weights in the types that it computes with.

    What ComfyUI attaches to the modules of a loaded model is left out: with dynamic VRAM these are
    handles of native memory, which a deep copy of them would free.
    """
    twins: dict[int, Any] = {}

    def light(held: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in twins:
            # With dynamic VRAM the weight has the file's type until it is loaded.
            dtype = getattr(held, f"{name}_comfy_model_dtype", None) or tensor.dtype
            twin: Any = torch.empty_like(tensor, device=META, dtype=dtype)
            if isinstance(tensor, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, requires_grad=False)
            twins[id(tensor)] = twin
        return twins[id(tensor)]

    def twin_of(held: torch.nn.Module) -> Any:
        if id(held) not in twins:
            twin = twins[id(held)] = copy.copy(held)
            twin.__dict__ = {
                # Copied, since tables of hooks must not be shared.
                name: copy.copy(value)
                for name, value in vars(held).items()
                if name in OWN or _plain(value)
            }
            for table in ("_parameters", "_buffers"):
                vars(twin)[table] = {n: light(held, n, t) for n, t in vars(held)[table].items()}
            twin._modules = {n: None if c is None else twin_of(c) for n, c in held._modules.items()}
        return twins[id(held)]

    return twin_of(module)


def _plain(value: Any) -> bool:
    """Whether it is a setting or a function, which copies may share."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, PLAIN)
