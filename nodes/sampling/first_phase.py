"""The first steps of a distilled run with another MODEL, one without the distillation LoRA and with
real guidance: it settles the motion, which such LoRAs make slow.
"""

from __future__ import annotations

from typing import Any

from ...kernels.errors import FrugalError
from .._comfy import LORA_KEY


def check(first: Any, model: Any, job: Any) -> None:
    """Raises FrugalError where `first` cannot begin what `model` ends. job: sampler_run.Job."""
    if not 0 < job.first_steps < job.steps:
        raise FrugalError(
            f"first_steps is {job.first_steps} of {job.steps} steps",
            "fewer than all",
            "lower first_steps, or disconnect first_model",
        )
    if type(first.model) is not type(model.model):
        raise FrugalError(
            f"first_model is a {type(first.model).__name__}, model a {type(model.model).__name__}",
            "two models of one kind",
            "connect the loader of the same model, without the LoRA",
        )
    loras = [each.get_attachment(LORA_KEY) or () for each in (first, model)]
    same = first.model is model.model and first.patches_uuid == model.patches_uuid
    if same and loras[0] == loras[1]:
        raise FrugalError(
            "first_model is the same as model",
            "the model without the distillation LoRA",
            "connect what goes into the LoRA loader",
        )


def notes(job: Any) -> list[str]:
    """What to say of the phase."""
    text = f"first phase: {job.first_steps} of {job.steps} steps with first_model at cfg"
    if job.cfg > 1:
        return [f"{text} {job.cfg:g}"]
    return [f"{text} {job.cfg:g}: guidance comes from a cfg above 1, such as 3.5"]
