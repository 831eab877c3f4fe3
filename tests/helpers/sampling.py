"""A tiny Wan with two prompts, sampled by ComfyUI itself, and counters around the model.

Random weights make a velocity that no line can follow, so there is also one with the exact velocity
of a known distribution in place of its network.
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from frugal.nodes.wan import load_run
from frugal.tests.helpers import rounding
from frugal.tests.helpers import wan as bed

SEED, CFG = 11, 3.0
TEXT_TOKENS = 512


def tiny_wan(folder):
    """A ModelPatcher of a random float32 Wan 2.1 T2V of two layers."""
    path = folder / "wan_tiny.safetensors"
    bed.write(path, bed.base(bed.weights(), torch.float32)[0])
    with torch.inference_mode():
        return load_run.load_wan(path, "fp32")[0]


def smooth(model):
    """A clone whose network is an exact flow: each latent value comes from a mixture of two
    Gaussians at +m and -m with deviation 0.5, m from the prompt.
    """
    clone = model.clone()
    clone.add_object_patch("diffusion_model.forward", exact_velocity)
    return clone


def exact_velocity(x, timestep, context, *_, **__):
    """x [B, 16, T, H, W], timestep [B] in 0..1000, context [B, tokens, 4096]: dx/dt."""
    t = (timestep.double() / 1000).reshape(-1, 1, 1, 1, 1)
    mode = 1 + 0.3 * torch.tanh(20 * context.double().mean((1, 2))).reshape(-1, 1, 1, 1, 1)
    keep, value = 1 - t, x.double()
    variance = (0.5 * keep) ** 2 + t * t
    centre = mode * torch.tanh(keep * mode * value / variance)
    denoised = centre + 0.25 * keep / variance * (value - keep * centre)
    return ((value - denoised) / t).to(x.dtype)


def two_prompts():
    make = torch.Generator().manual_seed(5)
    return [[[torch.randn(1, 12, 4096, generator=make), {}]] for _ in range(2)]


def latent_of(frames: int = 2, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 16, frames, 8, 8)


def counted(model):
    """(clone that counts, list of the batch sizes of its network calls in conditions)."""
    calls: list[int] = []

    def wrapper(executor, x, t, concat, context, control, options, **kwargs):
        calls.append(len(options["uuids"]))
        return executor(x, t, concat, context, control, options, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.count", wrapper)
    return clone, calls


def sample(model, prompts, steps, sampler="euler", cfg=CFG, latent=None, callback=None):
    """Denoised latent of a run with the simple schedule, as ComfyUI computes it."""
    latent = latent_of() if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, SEED)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", *prompts, latent,
            callback=callback, disable_pbar=True, seed=SEED,
        )  # fmt: skip


def rounding_of(model, steps: int, cfg: float = CFG) -> float:
    """How far two runs may lie apart whose matrix products have other shapes; the longest sums of
    these runs are over the text.
    """
    network = model.model.diffusion_model
    terms = rounding.terms(network, TEXT_TOKENS, torch.float32, steps)
    return rounding.bound(torch.float32, terms, gain=2 * abs(cfg) - 1)
