"""A copy of a block for the compiler: the same code, but layers with weights are operators.

Nothing of the block itself is touched. Containers are shallow copies that share their parameters'
table with the original, so a parameter that is exchanged there is exchanged here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..errors import FrugalError
from . import operators

# (layer, device, dtype) -> its weight and, if it has one, its bias, ready to compute with.
Fetch = Callable[[torch.nn.Module, torch.device, torch.dtype], list[torch.Tensor]]


class Layer(torch.nn.Module):
    """x (..., in) -> (..., width) by another module's own code."""

    def __init__(self, layer: torch.nn.Module, width: int):
        super().__init__()
        self.width = width
        # As a buffer it is an input of the graph, not a constant in it.
        self.register_buffer("number", operators.numbered(layer), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return operators.call_layer(x, self.number, self.width)


class _Source:
    def __init__(self, layer: torch.nn.Module, fetch: Fetch):
        self.layer, self.fetch = layer, fetch

    def weights(self, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        return self.fetch(self.layer, device, dtype)


class Norm(torch.nn.Module):
    """A layer norm or root mean square norm over the last axis, with weights fetched per call."""

    def __init__(self, layer: Any, fetch: Fetch, mean: bool):
        super().__init__()
        self.mean, self.eps = mean, layer.eps
        self.shape = tuple(layer.normalized_shape)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        self.rows = 0 if weight is None else 1 if bias is None else 2
        # Not a submodule: the compiler need not know it.
        object.__setattr__(self, "source", _Source(layer, fetch))
        self.register_buffer("number", operators.numbered(self.source), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = bias = None
        if self.rows:
            held = operators.layer_weights(self.number, self.rows, self.shape[0], x.device, x.dtype)
            weight, bias = held[0], held[1] if self.rows == 2 else None
        if self.mean:
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        return F.rms_norm(x, self.shape, weight, self.eps)


def shadow(block: torch.nn.Module, fetch: Fetch, path: str = "") -> torch.nn.Module:
    """The copy of `block`. Raises FrugalError where a part is of no known kind, or has a forward
    or a hook of its own that the copy would leave out.
    """
    if not path:
        return _container(block, fetch, "block")
    if not list(block.parameters()) and not list(block.children()):
        return block if plain(block) else _refuse(block, path)
    width = _width(block)
    if width:
        return Layer(block, width)
    kind = _norm_kind(block)
    if kind is None:
        return _container(block, fetch, path)
    return (
        Norm(block, fetch, kind)
        if plain(block)
        else Layer(block, cast(Any, block).normalized_shape[-1])
    )


def _container(block: torch.nn.Module, fetch: Fetch, path: str) -> torch.nn.Module:
    if not plain(block) or not list(block.children()):
        _refuse(block, path)
    twin = copy.copy(block)
    twin.__dict__ = {name: value for name, value in vars(block).items() if name != "forward"}
    twin._modules = {
        name: None if child is None else shadow(child, fetch, f"{path}.{name}")
        for name, child in block._modules.items()
    }
    return twin


def _refuse(block: torch.nn.Module, path: str) -> Any:
    what = "is of no known kind" if plain(block) else "was changed by another node"
    raise FrugalError(
        f"{path} ({type(block).__name__}) {what}",
        "a block of linear layers, norms and attention as the model's author wrote it",
        "turn compiling off, or remove the node that changes the block",
    )


def plain(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    own = vars(module).get("forward")
    # A host that takes a replacement away may leave the class's method bound on the instance.
    return own is None or (
        getattr(own, "__self__", None) is module
        and getattr(own, "__func__", None) is type(module).forward
    )


def _width(module: Any) -> int:
    """Of the result's last axis for what is computed whole: linear layers and chains of them."""
    if isinstance(module, torch.nn.Sequential):
        widths = [_width(child) for child in module]
        return next((width for width in reversed(widths) if width), 0)
    width = getattr(module, "out_features", 0)
    return width if isinstance(width, int) and hasattr(module, "in_features") else 0


def _norm_kind(module: Any) -> bool | None:
    """True for a norm that subtracts the mean, False for one that does not, None for others."""
    if len(getattr(module, "normalized_shape", ())) != 1:
        return None
    return isinstance(module, torch.nn.LayerNorm)
