"""fp8 weights whose scales form a grid over [out, in]: one for all, one per row, or one per block.

The shape of the scale says which grid it is:

    []                                 one scale
    [out, 1]                           one per row
    [out, groups]                      one per row and run of in / groups inputs
    [ceil(out/128), ceil(in/128)]      one per square of 128 (DeepSeek-V3, arXiv 2412.19437, 3.3.2)

A scale that is per row and, at the same time, per square of few rows counts as per row.
"""

from __future__ import annotations

import torch

SQUARE = 128


def squares(shape: tuple[int, int]) -> tuple[int, int]:
    """How many squares of 128 cover a weight [out, in]: rows and columns of them."""
    return -(-shape[0] // SQUARE), -(-shape[1] // SQUARE)


def is_grid(scale: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether a scale of this shape is a grid of blocks (not one scale, not one per row) for a
    weight [out, in].
    """
    if len(scale) != 2 or (scale[1] < 2 and scale[0] in (1, shape[0])):
        return False
    whole_runs = scale[0] == shape[0] and shape[1] % scale[1] == 0 and scale[1] < shape[1]
    return whole_runs or scale == squares(shape)


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """w = q * scale in `dtype` for fp8 q [out, in] and a float32 scale of one of the shapes above;
    rounded once by the product, the inputs stay as they are.
    """
    out = weight.to(dtype)
    if _by_row(scale, weight):
        return out.mul_(scale)
    grouped, spread = _grouped(out, scale)
    return grouped.mul_(spread).reshape(out.shape[0], -1)[:, : weight.shape[1]].contiguous()


def scale_like(weight: torch.Tensor, like: torch.Tensor, largest: float) -> torch.Tensor:
    """The scales of the grid `like` with which each block of a float weight [out, in] reaches
    `largest`; float32, in the shape of `like`.
    """
    top = weight.abs().float()
    if like.numel() == 1:
        found = top.amax()
    elif _by_row(like, weight):
        found = top.amax(dim=1, keepdim=True)
    else:
        found = _grouped(top, like)[0].amax(dim=2)
        if like.shape[0] != weight.shape[0]:
            rows = like.shape[0] * SQUARE
            padded = torch.nn.functional.pad(found, (0, 0, 0, rows - found.shape[0]))
            found = padded.reshape(like.shape[0], SQUARE, -1).amax(dim=1)
    return (found / largest).clamp(min=1e-30).reshape(like.shape)


def round_rows(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [rows, width] -> (fp8 of type `dtype`, float32 scale [rows, 1]), to the nearest; a
    row of zeros keeps zeros, one that is not finite gives NaN.
    """
    largest = torch.finfo(dtype).max
    scale = (values.abs().amax(dim=1, keepdim=True) / largest).clamp_(min=1e-30)
    return (values / scale).clamp_(-largest, largest).to(dtype), scale


def divide(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float weight [out, in] divided by its scales and held to the range of `dtype`, as float32:
    rounding is the caller's.
    """
    largest = torch.finfo(dtype).max
    values = weight.float()
    if _by_row(scale, weight):
        return (values / scale).clamp(-largest, largest)
    grouped, spread = _grouped(values, scale)
    parts = (grouped / spread).clamp(-largest, largest)
    return parts.reshape(values.shape[0], -1)[:, : values.shape[1]].contiguous()


def _by_row(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a scale is one for all or one per row."""
    return scale.dim() < 2 or (scale.shape[1] == 1 and scale.shape[0] in (1, weight.shape[0]))


def _grouped(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as [out, groups, run], padded with zeros where the last run is short, and its
    scales as [out, groups, 1].
    """
    rows, width = weight.shape
    if scale.shape[0] == rows and width % scale.shape[1] == 0:
        run, spread = width // scale.shape[1], scale
    else:
        run, spread = SQUARE, scale.repeat_interleave(SQUARE, dim=0)[:rows]
    short = scale.shape[1] * run - width
    padded = torch.nn.functional.pad(weight, (0, short)) if short else weight
    return padded.reshape(rows, scale.shape[1], run), spread[:, :, None]
