"""Runs ComfyUI's own KSampler on a model that a preset has prepared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import nodes as comfy_nodes

from ...kernels.log import LOG
from ...kernels.sampling.presets import PRESETS
from ...kernels.sampling.sampler_report import SamplerReport
from ...kernels.sampling.step_report import FEW_STEPS, StepCacheReport
from .._comfy import PLAN_KEY, runs_negative
from .._services import PLAN, offered
from . import (
    attention_run,
    compile_run,
    distilled_run,
    first_phase,
    guidance_range_run,
    matching,
    preview,
    step_cache_run,
)


@dataclass(frozen=True)
class Job:
    """The inputs of a KSampler, the preset's name, whether to preview in any case and whether to
    compile a Wan model's blocks.
    """

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float
    preset: str = "off"
    preview: bool = False
    compile_blocks: bool = False
    first_steps: int = 1


def run(model: Any, positive: Any, negative: Any, latent: dict, job: Job, first: Any = None):
    """(LATENT, SamplerReport). The latent is that of ComfyUI's KSampler to the bit while the preset
    is off. first: a MODEL without the distillation LoRA for the first `job.first_steps` steps, at
    the caller's guidance; the latent is then that of advanced KSamplers one after the other.
    """
    matching.check(model, (positive, negative), latent)
    caches: list[StepCacheReport] = []
    original = model
    model, cfg, notes = _prepared(model, job, caches, first is not None)
    sampled, steps = latent, {}
    began = time.perf_counter()
    if first is not None and PRESETS[job.preset].cfg is None:
        notes.append("first_model is not used: it belongs to the preset distilled")
    elif first is not None:
        first_phase.check(first, original, job)
        sampled = _first_phase(first, positive, negative, latent, job, notes)
        steps = {"disable_noise": True, "start_step": job.first_steps, "last_step": job.steps}
    planned = _planned(model, latent, job, cfg, notes)
    if planned is not None:
        model = planned.model
        planned.start()
    kernels = model.get_attachment(attention_run.KEY)
    by_hand = model.get_attachment(step_cache_run.KEY)
    earlier = None if by_hand is None else by_hand.report
    compiled = model.get_attachment(compile_run.KEY)
    (result,) = comfy_nodes.common_ksampler(
        model, job.seed, job.steps, cfg, job.sampler, job.scheduler, positive, negative, sampled,
        denoise=job.denoise, **steps,
    )  # fmt: skip
    if not _finite(result["samples"]):
        notes.append(
            "the latent has NaN or infinite values: sample with preset off and no Attention node, "
            "or load the model with another weight type"
        )
    if not caches and by_hand is not None and by_hand.report is not earlier:
        caches.append(by_hand.report)
    report = SamplerReport(
        job.preset,
        job.sampler,
        job.scheduler,
        job.steps,
        cfg,
        time.perf_counter() - began,
        None if kernels is None else kernels.table,
        tuple(caches),
        tuple(notes),
        None if planned is None else planned.outcome(),
        None if compiled is None else compiled.report,
    )
    LOG.info("[Frugal] %s", report.text())
    return result, report


def _finite(samples: Any) -> bool:
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    return all(bool(part.isfinite().all()) for part in parts)


def _first_phase(
    first: Any, positive: Any, negative: Any, latent: dict, job: Job, notes: list[str]
) -> dict:
    """The latent after the first steps, its noise still in it."""
    notes += first_phase.notes(job)
    if job.preview:
        first = preview.apply(first)
    if first.get_attachment(attention_run.KEY) is None:
        first = attention_run.apply(first)
    said: list[str] = []
    planned = _planned(first, latent, job, job.cfg, said)
    if planned is not None:
        first = planned.model
        planned.start()
    (result,) = comfy_nodes.common_ksampler(
        first, job.seed, job.steps, job.cfg, job.sampler, job.scheduler, positive, negative, latent,
        denoise=job.denoise, start_step=0, last_step=job.first_steps, force_full_denoise=False,
    )  # fmt: skip
    outcome = None if planned is None else planned.outcome()
    if outcome is not None:
        said.append(outcome.text())
    notes += [f"first phase: {line}" for line in said]
    return result


def _prepared(
    model: Any, job: Job, caches: list[StepCacheReport], has_first: bool
) -> tuple[Any, float, list[str]]:
    """The model with what the preset asks for, the guidance to use, and notes on both. has_first:
    whether another model uses the caller's guidance.
    """
    preset, cfg, notes = PRESETS[job.preset], job.cfg, []
    if job.preview:
        model = preview.apply(model)
    if job.compile_blocks and not compile_run.present(model):
        model = compile_run.apply(model)
    if preset.attention and model.get_attachment(attention_run.KEY) is None:
        model = attention_run.apply(model)
    if preset.cfg is not None and preset.cfg != cfg:
        if not has_first:
            notes.append(f"cfg {cfg:g} became {preset.cfg:g}: the preset is for distilled models")
        cfg = preset.cfg
    if preset.cfg is not None and job.steps > FEW_STEPS:
        notes.append(f"{job.steps} steps: distilled models are made for 4 to {FEW_STEPS}")
    if preset.cfg is not None:
        notes += distilled_run.notes(model, job)
    if preset.guidance_end < 1 and guidance_range_run.present(model):
        notes.append("the guidance range that is on the model stays as it was set there")
    elif preset.guidance_end < 1 and cfg != 1:
        model = guidance_range_run.apply(model, 0.0, preset.guidance_end)
        notes.append(f"guidance ends after {preset.guidance_end:.0%} of the schedule")
    if preset.threshold and step_cache_run.present(model):
        notes.append("the step cache that is on the model stays as it was set there")
    elif preset.threshold:
        options = step_cache_run.Options(preset.threshold)
        model = step_cache_run.apply(model, options, caches.append)
    return model, cfg, notes


def _planned(model: Any, latent: dict, job: Job, cfg: float, notes: list[str]) -> Any:
    """The run with the memory plan that the preset asks for, or that is on the model; else None."""
    there = model.get_attachment(PLAN_KEY) is not None
    if not (PRESETS[job.preset].plan or there):
        return None
    if compile_run.present(model) and not there:
        notes.append("no memory plan: compiled blocks run whole")
        return None
    plan_run = offered(PLAN)
    if plan_run is None:
        notes.append("no memory plan: the plan nodes are not loaded")
        return None
    found = plan_run(model, latent, runs_negative(model, cfg))
    if isinstance(found, str):
        notes.append(f"no memory plan: {found}")
        return None
    if there and PRESETS[job.preset].plan:
        notes.append("the memory plan that is on the model stays as it was made there")
    return found
