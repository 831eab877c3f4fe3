"""Noise that belongs to a picture and not to its place in a batch.

A sampler that draws fresh noise in every step draws it for the whole batch from one generator, so
the same picture would come out differently in a batch of four and alone. Here every picture has a
generator of its own. A sampler for which that cannot be arranged takes one picture at a time.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence

import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import torch

from .sigmas import DDIMSampler

SEEDS = 1 << 64
# Names that a sampler function uses if it draws noise without asking a noise sampler.
DRAWS = {"randn", "randn_like", "BrownianTreeNoiseSampler", "generic_step_sampler"}


def seed_of(seed: int, number: int) -> int:
    """Seed of picture `number` (from 0): they count up from `seed`, modulo 2^64."""
    return (seed + number) % SEEDS


def start_noise(latent: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Noise [B, ...] for a latent [B, ...]: row i is what ComfyUI draws for that row alone."""
    rows = [comfy.sample.prepare_noise(latent[i : i + 1], seed) for i, seed in enumerate(seeds)]
    return torch.cat(rows)


def can_batch(sampler) -> bool:
    """Whether `per_item` can keep the pictures of a batch apart with this SAMPLER."""
    if type(sampler) not in (comfy.samplers.KSAMPLER, DDIMSampler):
        return False
    function, options = sampler.sampler_function, sampler.extra_options
    if inspect.getmodule(function) is not comfy.k_diffusion.sampling:
        return False
    if options.get("s_churn") or options.get("noise_sampler") is not None:
        return False
    names = set(inspect.unwrap(function).__code__.co_names)
    if takes_noise_sampler(function):
        return "default_noise_sampler" in names and "BrownianTreeNoiseSampler" not in names
    # With its churn at 0 a function of this kind draws nothing.
    return not names & DRAWS or "s_churn" in inspect.signature(function).parameters


def takes_noise_sampler(function) -> bool:
    """Whether a sampler function draws noise between its steps."""
    return "noise_sampler" in inspect.signature(function).parameters


def per_item(sampler, seeds: Sequence[int]):
    """Copy of a SAMPLER for which `can_batch` holds; row i draws its noise as it would alone with
    seeds[i].
    """
    function = sampler.sampler_function
    if not takes_noise_sampler(function):
        return sampler

    @functools.wraps(function)
    def with_noise_of_its_own(model, x, sigmas, **options):
        draw = comfy.k_diffusion.sampling.default_noise_sampler
        rows = [draw(x[i : i + 1], seed=seed) for i, seed in enumerate(seeds)]

        def noise_sampler(sigma, sigma_next):
            return torch.cat([row(sigma, sigma_next) for row in rows])

        return function(model, x, sigmas, noise_sampler=noise_sampler, **options)

    chosen = copy.copy(sampler)
    chosen.sampler_function = with_noise_of_its_own
    return chosen
