"""The noise levels of CatVTON's sampler: DDIM with "leading" spacing and an offset of one step.

DDIM (Song et al., arXiv 2010.02502) with eta 1 is ancestral Euler in the terms of Karras et al.
(arXiv 2206.00364), sigma = sqrt((1 - alpha_bar) / alpha_bar); the two differ in where they start
and end.
"""

from __future__ import annotations

import torch

from ..errors import FrugalError


def ddim_timesteps(steps: int, trained: int = 1000) -> list[int]:
    """Training time steps of `steps` DDIM steps, noisiest first: (steps - 1) r + 1, ..., r + 1, 1.

    r = trained // steps. Raises FrugalError outside 1 <= steps < trained, where they would not fit.
    """
    if not 1 <= steps < trained:
        raise FrugalError(f"steps is {steps}", f"1 to {trained - 1}", "change steps")
    stride = trained // steps
    return [index * stride + 1 for index in range(steps - 1, -1, -1)]


def ddim_sigmas(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """Float32 [steps + 1] noise levels: those of `ddim_timesteps`, then that of time step 0.

    sigmas: [trained] noise levels of the model, rising. The last level is not 0: the reference
    ends one step early (`set_alpha_to_one` false) and decodes what little noise is left.
    """
    steps_taken = [*ddim_timesteps(steps, len(sigmas)), 0]
    return sigmas[steps_taken].to(torch.float32)


def to_ddim_scale(sigma: float) -> float:
    """sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2): the factor from x0 + sigma noise to DDIM's own
    scale.
    """
    return (1.0 + sigma * sigma) ** -0.5
