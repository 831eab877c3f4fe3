"""Low-rank changes beside a model's linear layers, as part of a MODEL.

While ComfyUI applies the model, each changed layer has a forward of its own that adds the change
to the layer's output; before and after, nothing of the model is different. A forward on the
instance is what torch.compile notices; it overlooks module hooks that come or go after it compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.lora.low_rank import Branch, Delta, branch, dora_gain
from .._comfy import LORA_KEY
from .._memory import pinning_may_fail

KEY = LORA_KEY


class StreamedMatrix(torch.nn.Module):
    """A matrix [rows, columns] that ComfyUI loads, offloads and casts as it does any weight."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        rows, columns = tensor.shape
        self.held = comfy.ops.manual_cast.Linear(
            columns, rows, bias=False, device="meta", dtype=tensor.dtype
        )
        self.held.weight = torch.nn.Parameter(tensor, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held(x)

    def add_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        weight, bias, handle = comfy.ops.cast_bias_weight(self.held, x, offloadable=True)
        try:
            out.addmm_(x, weight.t())
        finally:
            comfy.ops.uncast_bias_weight(self.held, weight, bias, handle)


class Vectors(torch.nn.Module):
    """What a layer gets besides products, each [out] or None: `bias` to add, `gain` - 1 by which
    its own product grows, and that times its own bias, which does not grow.
    """

    def __init__(self, bias: torch.Tensor | None, gain: torch.Tensor | None, kept: Any):
        super().__init__()
        for name, tensor in (("bias", bias), ("gain", gain), ("kept", kept)):
            held = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)


class SideLayer(torch.nn.Module):
    """What one LoRA adds to one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = torch.nn.ModuleList()
        self.branches: list[Branch] = []
        self.vectors: Vectors | None = None

    def add_delta(self, delta: Delta, place: tuple[int, int] | None, dtype: torch.dtype) -> None:
        def held(tensor: torch.Tensor) -> StreamedMatrix:
            matrix = StreamedMatrix(stored(tensor, dtype))
            self.matrices.append(matrix)
            return matrix

        self.branches.append(branch(delta, place, held))


def stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to the type it is used in where that is smaller; used in a larger one, it is cast
    then, without loss.
    """
    tensor = tensor.contiguous()
    if dtype.itemsize <= tensor.dtype.itemsize:
        tensor = tensor.to(dtype)
    # It may still be in the file's mapping.
    return tensor.clone() if pinning_may_fail() else tensor


@dataclass(frozen=True)
class SideLora:
    """One LoRA on a MODEL: `patcher` lets ComfyUI count and move what `layers` (path of the linear
    layer in the BaseModel -> SideLayer) hold.
    """

    name: str
    strength: float
    layers: dict[str, SideLayer] = field(repr=False)
    patcher: Any = field(repr=False)


def side_lora(model: Any, name: str, strength: float, layers: dict[str, SideLayer]) -> SideLora:
    """Made for `model`, a ModelPatcher, on its devices."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    module = torch.nn.ModuleList(layers.values())
    patcher = kind(module, load_device=model.load_device, offload_device=model.offload_device)
    return SideLora(name, strength, layers, patcher)


def attach(model: Any, lora: SideLora) -> Any:
    """A clone of `model` with one more LoRA."""
    model = model.clone()
    loras = (*(model.get_attachment(KEY) or ()), lora)
    model.set_attachments(KEY, loras)
    # ComfyUI then loads them with the model, counts them, and takes them away when it needs room.
    others = model.get_additional_models_with_key(KEY)
    model.set_additional_models(KEY, [*others, lora.patcher])
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _applied(loras))
    return model


def _applied(loras: tuple[SideLora, ...]) -> Callable[..., Any]:
    """An APPLY_MODEL wrapper under which the layers have their branches."""
    table: dict[str, list[tuple[SideLayer, float]]] = {}
    for lora in loras:
        for path, layer in lora.layers.items():
            table.setdefault(path, []).append((layer, lora.strength))
    # One function per layer for all steps, or torch.compile would compile at each.
    forwards = {path: _forward(entries) for path, entries in table.items()}

    def wrapper(executor, *args, **kwargs):
        changed: list[tuple[torch.nn.Module, Any]] = []
        try:
            for path, forward in forwards.items():
                # The model that runs, which need not be the one that the LoRA was made for.
                _install(executor.class_obj, path, forward, changed)
            return executor(*args, **kwargs)
        finally:
            for module, before in reversed(changed):
                if before is None:
                    del module.forward
                else:
                    module.forward = before

    return wrapper


def _install(
    model: Any, path: str, forward: Callable[..., Any], changed: list[tuple[torch.nn.Module, Any]]
) -> None:
    module, parent = (_found(model, name) for name in (path, path.rpartition(".")[0]))
    if fuses(parent) and all(parent is not seen for seen, _ in changed):
        changed.append((parent, parent.__dict__.get("forward")))
        parent.forward = MethodType(_unfused, parent)
    before = module.__dict__.get("forward")
    if getattr(before, "entries", None) is forward.entries:  # type: ignore[attr-defined]
        # ComfyUI joins lists of wrappers, so one can come twice.
        return
    changed.append((module, before))
    module.forward = MethodType(forward if before is None else _over(before, forward), module)


def _found(model: torch.nn.Module, path: str) -> torch.nn.Module:
    module = model.get_submodule(path)
    # A module that torch.compile wraps calls the one inside it.
    return getattr(module, "_orig_mod", module)


def fuses(parent: torch.nn.Module) -> bool:
    """Whether this Sequential runs a layer of its own without calling it, as ComfyUI's feed-forward
    does to fold the activation into int8 products.
    """
    code = getattr(type(parent).forward, "__code__", None)
    names = () if code is None else code.co_names
    return isinstance(parent, torch.nn.Sequential) and "linear_input_act" in names


def _unfused(self: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Sequential.forward(self, x)


def _forward(entries: list[tuple[SideLayer, float]]) -> Callable[..., Any]:
    def forward(self, x, *args, **kwargs):
        return _add(type(self).forward(self, x, *args, **kwargs), x, entries)

    forward.entries = entries  # type: ignore[attr-defined]
    return forward


def _over(before: Callable[..., Any], forward: Any) -> Callable[..., Any]:
    """The same over a forward that something else put on the instance."""
    entries = forward.entries

    def over(self, x, *args, **kwargs):
        return _add(before(x, *args, **kwargs), x, entries)

    over.entries = entries  # type: ignore[attr-defined]
    return over


def _add(
    out: torch.Tensor, x: torch.Tensor, entries: list[tuple[SideLayer, float]]
) -> torch.Tensor:
    """out + the changes for the input x, in place."""
    out = out.contiguous()
    flat_out, flat_x = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
    gains = [(layer.vectors, strength) for layer, strength in entries if _grows(layer)]
    if gains:
        # They act on the layer's own product, so they come before anything is added to it.
        _grow(flat_out, gains)
    for layer, strength in entries:
        if layer.vectors is not None and layer.vectors.bias is not None:
            flat_out.add_(layer.vectors.bias.to(flat_out), alpha=strength)
        for side in layer.branches:
            side.add_(flat_out, flat_x, strength)
    return out


def _grows(layer: SideLayer) -> bool:
    return layer.vectors is not None and layer.vectors.gain is not None


def _grow(out: torch.Tensor, gains: list[tuple[Any, float]]) -> None:
    factor: Any = 1.0
    kept: Any = None
    for vectors, strength in gains:
        factor = factor + strength * vectors.gain.to(out.device)
        if vectors.kept is not None:
            share = strength * vectors.kept.to(out.device)
            kept = share if kept is None else kept + share
    out.mul_(factor.to(out.dtype))
    if kept is not None:
        out.sub_(kept.to(out.dtype))


def dora_vectors(
    weight: torch.Tensor, bias: torch.Tensor | None, delta: Delta, magnitude: torch.Tensor
) -> tuple[Delta, torch.Tensor, torch.Tensor | None]:
    """(delta with the magnitude in its rows, gain - 1 [out], that times the layer's bias): see
    kernels/lora/low_rank.py. weight [out, in] dequantised.
    """
    gain = dora_gain(weight, delta, magnitude).to("cpu")
    kept = None if bias is None else (gain - 1) * bias.detach().float().cpu()
    return delta.scaled_rows(gain), gain - 1, kept
