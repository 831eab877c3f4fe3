"""What a run with a distilled model should be told of, read from the MODEL and the sampler's own
noise levels.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ...kernels.sampling.distilled import advice
from .._comfy import LORA_KEY, experts_of

HIGH, LOW = "the high noise expert", "the low noise expert"


def notes(model: Any, job: Any) -> list[str]:
    """Notes on a MODEL, one or two experts, that is to be sampled as `job` (sampler_run.Job)."""
    switch = experts_of(model)
    if switch is None:
        return advice(_sigmas(model, job), {"the model": _has_lora(model)}, {})
    # A LoRA that came after the experts were joined acts on both.
    later = model.patches_uuid != switch.high.patches_uuid
    loras = {HIGH: later or _has_lora(switch.high), LOW: later or _has_lora(switch.low)}
    return advice(_sigmas(model, job), loras, {LOW: switch.cfg_low})


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
