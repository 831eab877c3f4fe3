"""A flow that is known exactly, fixed samplers, and the rule of EasyCache to compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

WIDTH, MODES = 32, 8
# Denoised estimate of x [B, ...] at a noise level in 0..1.
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


class MixtureFlow:
    """x(t) = (1 - t) x0 + t n with x0 from a mixture of 8 isotropic Gaussians in 32 dimensions and
    n standard normal: the denoised estimate E[x0 | x(t)] in closed form, float64, calls counted.
    """

    def __init__(self, seed: int, spread: float = 0.35):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=make, dtype=torch.float64)

        self.means = normal(MODES, WIDTH)
        self.weights = torch.softmax(0.5 * normal(MODES), 0)
        share = torch.rand(MODES, generator=make, dtype=torch.float64)
        self.deviations = spread * (0.5 + share)
        self.noise = normal(32, WIDTH)
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        self.calls += 1
        keep = 1 - t
        variance = (keep * self.deviations) ** 2 + t * t
        offset = x[:, None] - keep * self.means
        score = self.weights.log() - 0.5 * offset.square().sum(-1) / variance
        share = torch.softmax(score - 0.5 * WIDTH * variance.log(), 1)
        gain = (keep * self.deviations**2 / variance)[:, None]
        return (share[..., None] * (self.means + gain * offset)).sum(1)


def levels(steps: int, shift: float = 8.0) -> list[float]:
    """Noise levels of a flow schedule with Wan's shift, 1 down to 0."""
    plain = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in plain]


def percent(share: float, shift: float = 8.0) -> float:
    """Noise level at which a share of the schedule is done."""
    return shift * (1 - share) / (1 + (shift - 1) * (1 - share))


def euler(denoise: Denoiser, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    for now, after in itertools.pairwise(sigmas):
        x = x + (after - now) * (x - denoise(x, now)) / now
    return x


def heun(denoise: Denoiser, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    for now, after in itertools.pairwise(sigmas):
        slope = (x - denoise(x, now)) / now
        there = x + (after - now) * slope
        if after > 0:
            slope = (slope + (there - denoise(there, after)) / after) / 2
        x = x + (after - now) * slope
    return x


class EasyCacheRule:
    """EasyCache (Zhou et al. 2025) on the velocity of a flow: the model's output changes in
    proportion to its input; while the changes expected since the last call add up to less than a
    threshold, output = input + the last difference of the two. `start`, `end`: noise levels.
    """

    def __init__(self, denoise: Denoiser, threshold: float, start: float, end: float):
        self.denoise, self.threshold = denoise, threshold
        self.start, self.end = start, end
        self.rate: torch.Tensor | None = None
        self.change = 0.0
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        inside = self.end < t <= self.start
        if inside and self.last is not None:
            before, output = self.last
            moved = (x - before).abs().mean()
            if self.rate is not None:
                self.change += self.rate * moved / output.abs().mean()
                if self.change < self.threshold:
                    return x - t * (x + (output - before))
                self.change = 0.0
        velocity = (x - self.denoise(x, t)) / t
        if inside and self.last is not None:
            self.rate = (velocity - output).abs().mean() / moved
        if inside:
            self.last = (x, velocity)
        return x - t * velocity


def at_calls(run: Callable[[float], tuple[int, torch.Tensor]], calls: int, top: float):
    """(calls made, result) of the run that makes most calls, but at most so many, by bisection of
    its threshold in 0..top; more threshold means fewer calls.
    """
    low, high, best = 0.0, top, run(top)
    for _ in range(30):
        middle = (low + high) / 2
        made, result = run(middle)
        if made == calls:
            return made, result
        if made > calls:
            low = middle
        else:
            high, best = middle, max(best, (made, result), key=lambda found: found[0])
    return best


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    return math.sqrt(float((out - reference).square().sum() / reference.square().sum()))
