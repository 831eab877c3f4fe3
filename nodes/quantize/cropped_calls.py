"""A call of the diffusion model, as its DIFFUSION_MODEL wrapper gets it, cut to a small latent that
can be run besides the user's own without being felt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

# Bound the cost: tokens of the latent by item of the batch, and its frames.
MOST_TOKENS = 1024
MOST_FRAMES = 4
# Those whose inputs are known to survive the cut.
CLASSES = ("WanModel", "VaceWanModel")
OPTIONS = "transformer_options"


def options_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer_options of a call."""
    found = next((each for each in args if isinstance(each, dict)), None)
    return kwargs.get(OPTIONS, {}) if found is None else found


def cut(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call on a small latent: the first of `args` is the latent [batch, channels, frames,
    height, width], and what goes with its frames, height and width is cut alike.
    """
    size = tuple(args[0].shape[-3:])
    return tuple(_cut(value, size) for value in args), {
        name: _cut(value, size) for name, value in kwargs.items()
    }


def run(executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The output for a call, past all further wrappers. The model may write into its options, so it
    gets its own.
    """
    fresh = [dict(each) if isinstance(each, dict) else each for each in args]
    more = {name: dict(each) if isinstance(each, dict) else each for name, each in kwargs.items()}
    return executor.original(*fresh, **more)


def named(executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, without the options and those that are None."""
    bound = inspect.signature(executor.original).bind(*args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        many = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found |= value if many else {name: value}
    return {name: value for name, value in found.items() if name != OPTIONS and value is not None}


def _cut(value: Any, size: tuple[int, ...]) -> Any:
    """A latent of `size` (frames, height, width; latent pixels), or one of that height and width,
    cut to its first frames and its middle; times by frame likewise; all else as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(each, size) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    frames = min(size[0], MOST_FRAMES)
    if value.ndim == 2 and value.shape[1] == size[0]:
        return value[:, :frames].clone()
    if value.ndim < 4 or tuple(value.shape[-2:]) != tuple(size[1:]):
        return value
    side = 2 * int((MOST_TOKENS / frames) ** 0.5)
    for axis, length in ((-2, size[1]), (-1, size[2])):
        kept = min(length, side)
        value = value.narrow(axis, (length - kept) // 2, kept)
    if value.shape[-3] == size[0] and value.ndim > 4:
        value = value.narrow(-3, 0, frames)
    return value.clone()
