"""Operators that keep a layer's weights out of a compiled graph.

What moves, casts or patches a weight is the host program's Python, which no graph can hold: it
would freeze the weight's place, and a LoRA, at the time of compiling. Each such layer therefore is
one operator that runs the layer's own code at every call. Which layer is meant comes as a tensor,
since a number would be frozen into the graph and every block would need a graph of its own.

The operators are no functions of their arguments alone: they read the layer's state, which must not
change while one block runs.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import FrugalError

Attend = Callable[..., torch.Tensor]
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_running = threading.local()


def numbered(layer: Any) -> torch.Tensor:
    """The number under which the operators find `layer` while it lives: int64, no axes, CPU."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def layer_of(number: torch.Tensor) -> Any:
    """The layer that a compiled block knows by a number. Raises FrugalError if it is gone."""
    layer = _layers.get(int(number))
    if layer is None:
        raise FrugalError(
            f"a compiled block asks for layer {int(number)}, which is gone",
            "the model that it was compiled from",
            "load the model again",
        )
    return layer


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Inside, attention in compiled blocks of this thread is `attend(q, k, v, heads, mask,
    low_precision)` -> (B, Lq, H * Dv), from q (B, Lq, H * D), k and v (B, Lk, H * D).
    """
    before = getattr(_running, "attend", None)
    _running.attend = attend
    try:
        yield
    finally:
        _running.attend = before


def _checked(found: torch.Tensor, shape: tuple[int, ...], like: torch.dtype, what: str):
    if tuple(found.shape) != shape or found.dtype != like:
        raise FrugalError(
            f"{what} gave {tuple(found.shape)} {found.dtype} in a compiled block",
            f"{shape} {like}, as the graph was made for",
            "turn compiling off for this model",
        )
    return found.contiguous()


def _call_layer(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    layer = layer_of(number)
    return _checked(layer(x), (*x.shape[:-1], width), x.dtype, type(layer).__name__)


def _call_layer_shape(x, number, width):
    return x.new_empty((*x.shape[:-1], width))


def _weights(
    number: torch.Tensor, rows: int, width: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    found = layer_of(number).weights(device, dtype)
    return _checked(torch.stack(found), (rows, width), dtype, "a norm's weights")


def _weights_shape(number, rows, width, device, dtype):
    return torch.empty(rows, width, device=device, dtype=dtype)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    low_precision: bool,
) -> torch.Tensor:
    attend = getattr(_running, "attend", None)
    if attend is None:
        raise FrugalError(
            "a compiled block ran outside a sampling run",
            "the sampler that it was compiled in",
            "remove the compile option",
        )
    out = attend(q, k, v, heads, mask, low_precision)
    width = heads * (v.shape[-1] // heads)
    return _checked(out, (*q.shape[:-1], width), q.dtype, "attention")


def _attention_shape(q, k, v, mask, heads, low_precision):
    return q.new_empty((*q.shape[:-1], heads * (v.shape[-1] // heads)))


def _operator(name: str, schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> Any:
    made = torch.library.custom_op(f"frugal::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return made


call_layer = _operator(
    "call_layer",
    "(Tensor x, Tensor number, SymInt width) -> Tensor",
    _call_layer,
    _call_layer_shape,
)
layer_weights = _operator(
    "layer_weights",
    "(Tensor number, SymInt rows, SymInt width, Device device, ScalarType dtype) -> Tensor",
    _weights,
    _weights_shape,
)
block_attention = _operator(
    "block_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, SymInt heads, bool low_precision) -> Tensor",
    _attention,
    _attention_shape,
)
