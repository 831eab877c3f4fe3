"""CatVTON's own sampler in ComfyUI's terms."""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import torch

from ...kernels.errors import FrugalError
from ...kernels.tryon import schedule


class DDIMSampler(comfy.samplers.KSAMPLER):
    """Ancestral Euler that starts and ends as DDIM does.

    It starts from noise of DDIM's scale, sqrt(1 + sigma^2), although the first level is below the
    model's highest, and gives the result back on DDIM's scale when the last level is not 0.
    """

    def __init__(self, eta: float, **options):
        super().__init__(comfy.k_diffusion.sampling.sample_euler_ancestral, {"eta": eta, **options})

    def max_denoise(self, model_wrap, sigmas):
        return True

    def sample(self, model_wrap, sigmas, *args, **kwargs):
        samples = super().sample(model_wrap, sigmas, *args, **kwargs)
        return samples * schedule.to_ddim_scale(float(sigmas[-1]))


def reference_schedule(model, steps: int, eta: float) -> tuple[torch.Tensor, DDIMSampler]:
    """(SIGMAS [steps + 1], SAMPLER) for a MODEL with discrete noise levels."""
    levels = model.get_model_object("model_sampling")
    if not isinstance(levels, comfy.model_sampling.ModelSamplingDiscrete):
        raise FrugalError(
            f"the model samples with {type(levels).__mro__[1].__name__}",
            "the discrete noise levels of SD 1.5",
            "connect the MODEL of 'Load CatVTON'",
        )
    return schedule.ddim_sigmas(levels.sigmas.cpu(), steps), DDIMSampler(eta)
