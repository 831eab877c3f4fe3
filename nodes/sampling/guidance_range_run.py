"""Guidance in a part of the schedule only (Kynkaanniemi et al. 2024): elsewhere cfg is 1, and
ComfyUI then leaves the negative prompt out, which halves the work of a step.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP

from ...kernels.errors import FrugalError
from .._comfy import for_each_expert

KEY = "frugal.guidance_range"


@for_each_expert
def apply(model: Any, start: float, end: float) -> Any:
    """A clone of the ModelPatcher `model` that is guided from `start` to `end`, parts of the
    schedule in 0..1. A range of this pack that is there already is replaced.
    """
    if start >= end:
        raise FrugalError(
            f"start {start:g} and end {end:g}",
            "a start before the end",
            "lower the start or raise the end",
        )

    def wrapper(executor, x, timestep, *args, **kwargs):
        """A PREDICT_NOISE wrapper; timestep [B], sigmas."""
        guider = executor.class_obj
        # Of the model as it runs: a node behind this one may have changed the schedule.
        sampling = guider.inner_model.model_sampling
        high, low = float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))
        if low <= float(timestep.max()) <= high:
            return executor(x, timestep, *args, **kwargs)
        if type(guider).set_cfg is not comfy.samplers.CFGGuider.set_cfg:
            raise FrugalError(
                f"a guidance range with {type(guider).__name__}",
                "a sampler with one cfg",
                "remove the guidance range or use another guider",
            )
        own = guider.cfg
        guider.cfg = 1.0
        try:
            return executor(x, timestep, *args, **kwargs)
        finally:
            guider.cfg = own

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, wrapper)
    return model


def present(model: Any) -> bool:
    """Whether the ModelPatcher has a guidance range of this pack."""
    return KEY in model.wrappers.get(WrappersMP.PREDICT_NOISE, {})
