"""Synthetic linear layers whose inputs are correlated and have outlier channels, as those of
trained transformers have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """weight [out, in]; inputs to calibrate on and inputs held out, [rows, in], all float32."""

    weight: torch.Tensor
    seen: torch.Tensor
    held_out: torch.Tensor


def layer(
    seed: int, out: int = 768, inside: int = 1024, seen: int = 4096, held_out: int = 2048
) -> Layer:
    """Weights N(0, 1/in) with uneven rows and rare entries 6 times as large; inputs in a random
    orthogonal basis with standard deviations from 8 down to 8 * 10^-1.5, then 8 channels times 15.
    """
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inside, generator=make) / inside**0.5
    weight *= 1 + 0.5 * torch.randn(out, 1, generator=make).abs()
    rare = torch.randint(0, out * inside, (out * inside // 2000,), generator=make)
    weight.view(-1)[rare] *= 6
    basis, _ = torch.linalg.qr(torch.randn(inside, inside, generator=make))
    spread = torch.logspace(0, -1.5, inside)
    inputs = 8 * (torch.randn(seen + held_out, inside, generator=make) * spread) @ basis.t()
    inputs[:, torch.randperm(inside, generator=make)[:8]] *= 15
    return Layer(weight, inputs[:seen], inputs[seen:])


def output_error(weight: torch.Tensor, held: torch.Tensor, inputs: torch.Tensor) -> float:
    """||(held - weight) x|| / ||weight x|| over inputs [rows, in]."""
    return float(((held - weight) @ inputs.t()).norm() / (weight @ inputs.t()).norm())
