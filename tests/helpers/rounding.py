"""How far two roundings of the same sums may lie apart: the bound where bits are not promised.

A sum of n terms is off by about u sqrt(n) of its size, u the rounding unit of the type it is added
up in, and sums that feed one another by u sqrt(n + m): errors of unlike sign. Two ways of adding up
(another kernel, cut, order or number of threads) differ by no more than that, times SAFETY for what
the layers between do to it and for the largest of many values. Types of 16 bits are added up in
float32 and rounded once per result, so there a sum counts as one term.
"""

from __future__ import annotations

import math

import torch

SAFETY = 2


def bound(dtype: torch.dtype, terms: float, gain: float = 1) -> float:
    """Of `distance`. terms: of all sums on the longest way through. gain: what comes after
    multiplies errors by it, as guidance does by its scale.
    """
    return SAFETY * gain * torch.finfo(dtype).eps / 2 * math.sqrt(terms)


def terms(model: torch.nn.Module, tokens: int, dtype: torch.dtype, steps: int = 1) -> float:
    """Terms of all sums in `steps` forwards of a transformer: those of each matrix product and
    convolution, and over `tokens` of the attention beside each norm of keys.
    """
    found = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim > 1:
            found += weight[0].numel() if dtype == torch.float32 else 1
        elif weight is not None:
            found += tokens if dtype == torch.float32 else 1
    return steps * found


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; inf for NaN or shapes."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.double(), expected.double()
    found = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    return math.inf if math.isnan(found) else found
