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
from .._comfy import PLAN_KEY
from .._services import PLAN, offered
from . import (
    attention_run,
    compile_run,
    distilled_run,
    guidance_range_run,
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


def run(model: Any, positive: Any, negative: Any, latent: dict, job: Job):
    """(LATENT, SamplerReport). The latent is that of ComfyUI's KSampler to the bit while the preset
    is off.
    """
    caches: list[StepCacheReport] = []
    model, cfg, notes = _prepared(model, job, caches)
    planned = _planned(model, latent, job, cfg, notes)
    if planned is not None:
        model = planned.model
        planned.start()
    kernels = model.get_attachment(attention_run.KEY)
    by_hand = model.get_attachment(step_cache_run.KEY)
    earlier = None if by_hand is None else by_hand.report
    compiled = model.get_attachment(compile_run.KEY)
    started = time.perf_counter()
    (result,) = comfy_nodes.common_ksampler(
        model, job.seed, job.steps, cfg, job.sampler, job.scheduler, positive, negative, latent,
        denoise=job.denoise,
    )  # fmt: skip
    if not caches and by_hand is not None and by_hand.report is not earlier:
        caches.append(by_hand.report)
    report = SamplerReport(
        job.preset,
        job.sampler,
        job.scheduler,
        job.steps,
        cfg,
        time.perf_counter() - started,
        None if kernels is None else kernels.table,
        tuple(caches),
        tuple(notes),
        None if planned is None else planned.outcome(),
        None if compiled is None else compiled.report,
    )
    LOG.info("[Frugal] %s", report.text())
    return result, report


def _prepared(model: Any, job: Job, caches: list[StepCacheReport]) -> tuple[Any, float, list[str]]:
    """The model with what the preset asks for, the guidance to use, and notes on both."""
    preset, cfg, notes = PRESETS[job.preset], job.cfg, []
    if job.preview:
        model = preview.apply(model)
    if job.compile_blocks and not compile_run.present(model):
        model = compile_run.apply(model)
    if preset.attention and model.get_attachment(attention_run.KEY) is None:
        model = attention_run.apply(model)
    if preset.cfg is not None and preset.cfg != cfg:
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
    found = plan_run(model, latent, cfg != 1)
    if isinstance(found, str):
        notes.append(f"no memory plan: {found}")
        return None
    if there and PRESETS[job.preset].plan:
        notes.append("the memory plan that is on the model stays as it was made there")
    return found
