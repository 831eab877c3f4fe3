"""What a run with a distilled model should be told of, read from the MODEL and the sampler's own
noise levels.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ...kernels.sampling.distilled import advice
from .._comfy import LORA_KEY, experts_of


def notes(model: Any, job: Any) -> list[str]:
    """Notes on a MODEL, one or two experts, that is to be sampled as `job` (sampler_run.Job)."""
    switch = experts_of(model)
    experts = {"the model": model}
    cfg = {}
    if switch is not None:
        experts = {"the high noise expert": switch.high, "the low noise expert": switch.low}
        cfg = {"the low noise expert": switch.cfg_low}
    return advice(_sigmas(model, job), {name: _has_lora(m) for name, m in experts.items()}, cfg)


def _has_lora(model: Any) -> bool:
    return bool(model.patches or model.get_attachment(LORA_KEY))


def _sigmas(model: Any, job: Any) -> list[float]:
    if job.denoise < 1 or not hasattr(model.get_model_object("model_sampling"), "shift"):
        return []
    sampler = comfy.samplers.KSampler(
        model, job.steps, model.load_device, job.sampler, job.scheduler, job.denoise,
        model.model_options,
    )  # fmt: skip
    return sampler.sigmas.tolist()
