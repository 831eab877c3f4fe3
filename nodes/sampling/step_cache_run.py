"""Puts a step cache into a sampling run: what identifies a condition, and where it must not act.

The cache sits around the guider's prediction (PREDICT_NOISE): there the argument is the latent and
the result the guided denoised estimate in float32, whatever the network's precision, extra channels
or parameterisation, whatever guidance is at work and however many conditions it calls for. So an
error is judged as it reaches the sampler, amplified by the guidance. It is made when the steps of a
run start, in the options of that run, and is gone when they end, are cancelled or fail.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.sampling.step_cache import StepCache, StepCacheSettings
from ...kernels.sampling.step_report import StepCacheReport, advice
from .._comfy import CAUSAL_KEY, for_each_expert

KEY = "frugal.step_cache"
OTHER_CACHES = ("easycache", "lazycache")
# What ComfyUI's guidance patches call the noise levels between which they act.
BORDERS = ("sigma_start", "sigma_end")


@dataclass(frozen=True)
class Options:
    """threshold: largest relative error of the velocity to accept, 0 for off. start, end: the part
    of the schedule where calls may be skipped, 0..1. max_skips: most noise levels in a row.
    """

    threshold: float = 0.05
    start: float = 0.15
    end: float = 0.95
    max_skips: int = 3


class LastRun:
    """Hands the report of the latest run to whoever has the model; None before the first."""

    def __init__(self) -> None:
        self.report: StepCacheReport | None = None


@for_each_expert
def apply(model: Any, options: Options, show: Callable[[StepCacheReport], None]) -> Any:
    """A clone of the ModelPatcher `model` with the cache and, attached under KEY, a `LastRun`;
    `show` gets each run's report. A step cache of this pack that is there already is replaced.
    """
    if options.start >= options.end:
        raise FrugalError(
            f"start {options.start:g} and end {options.end:g}",
            "a start before the end",
            "lower the start or raise the end",
        )
    model = model.clone()
    last = LastRun()

    def report(found: StepCacheReport) -> None:
        last.report = found
        show(found)

    model.set_attachments(KEY, last)
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _each_run(options, report))
    return model


def present(model: Any) -> bool:
    """Whether the ModelPatcher has a step cache of this pack."""
    return KEY in model.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {})


def log(report: StepCacheReport) -> None:
    """The report as a line of the log."""
    LOG.info("[Frugal] %s", report.text())


def _each_run(options: Options, show: Callable[[StepCacheReport], None]) -> Callable[..., Any]:
    """A SAMPLER_SAMPLE wrapper."""

    def wrapper(executor, guider, sigmas, extra_args, *args, **kwargs):
        of_run = extra_args["model_options"]
        reason = _reason_to_stand_aside(guider, of_run)
        sampling = guider.inner_model.model_sampling
        settings = StepCacheSettings(
            0.0 if reason else options.threshold,
            float(sampling.percent_to_sigma(options.start)),
            float(sampling.percent_to_sigma(options.end)),
            options.max_skips,
            tuple(sigmas.tolist()),
        )
        notes = [reason] if reason else advice(options.threshold, len(sigmas) - 1)
        cache = StepCache(settings)
        # Innermost, so that it sees the guidance that the others leave. The guider has a copy of
        # the options for this run, and another for the steps.
        options_of_guider = guider.model_options
        add_wrapper_with_key(
            WrappersMP.PREDICT_NOISE, KEY, partial(_guided, cache), options_of_guider, True
        )
        try:
            result = executor(guider, sigmas, extra_args, *args, **kwargs)
            show(cache.report(notes))
            return result
        finally:
            wrappers = options_of_guider["transformer_options"]["wrappers"]
            wrappers[WrappersMP.PREDICT_NOISE].pop(KEY, None)
            cache.clear()

    return wrapper


def _guided(cache: StepCache, executor, x, timestep, model_options=None, seed=None):
    """A PREDICT_NOISE wrapper. x [B, C, ...]; timestep [B], sigmas."""
    model_options = model_options or {}
    guider = executor.class_obj
    options = model_options.get("transformer_options", {})
    # What the last step left on the device is read with this step's noise levels: one wait.
    low, high = timestep.aminmax()
    left = [miss.to(low) for miss in cache.unread()]
    drift = cache.drift(x, high)
    moved = [] if drift is None else [drift.to(low)]
    low, high, *values = torch.stack([low, high, *moved, *left]).tolist()
    if moved:
        cache.moved(values.pop(0), high)
    cache.settle(values)
    # A pass that writes keys and values into a cache of the model is no mere estimate; gradients
    # need the graph of every step; and one line cannot serve several noise levels.
    whole = "ar_state" in options or torch.is_grad_enabled() or low != high
    keys = [] if whole else [_regime(guider, high, model_options)]

    def compute():
        return [executor(x, timestep, model_options, seed)]

    return cache.evaluate(keys, x, high, compute)[0]


def _regime(guider: Any, sigma: float, model_options: dict) -> Hashable:
    """What decides the guided velocity at this noise level, apart from x: the conditions that act,
    the scales of the guider, and which side of its borders each patch of the guidance is on.
    """
    scales = tuple(
        (name, value) for name, value in sorted(vars(guider).items()) if type(value) in (int, float)
    )
    conds = tuple(
        (side, _identity(guider.inner_model, each, sigma))
        for side, each in sorted(guider.conds.items())
    )
    return scales, conds, tuple(sigma >= border for border in _borders(model_options))


def _borders(model_options: dict) -> list[float]:
    """Noise levels at which patches of this run begin or cease to act. ComfyUI's nodes keep them
    in the closures of their patches, and nowhere else.
    """
    found, seen, waiting = set(), set(), [model_options]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif inspect.isfunction(each):
            names = each.__code__.co_freevars
            for name, cell in zip(names, each.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # a cell may be empty yet
                    if name in BORDERS and isinstance(cell.cell_contents, (int, float)):
                        found.add(float(cell.cell_contents))
    return sorted(found)


def _identity(model: Any, cond: list[dict] | None, sigma: float) -> Hashable | None:
    """What tells a condition, as it acts on this model at this noise level, from any other; None
    if nothing of it acts.
    """
    parts = tuple(
        (each["uuid"], *_controls(each.get("control"), sigma))
        for each in cond or ()
        if not _outside(sigma, each.get("timestep_start"), each.get("timestep_end"))
    )
    return (id(model), parts) if parts else None


def _controls(control: Any, sigma: float) -> tuple[bool, ...]:
    """Which of a chain of ControlNets act at this noise level."""
    acting = []
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (None, None)
        acting.append(not _outside(sigma, start, end))
        control = getattr(control, "previous_controlnet", None)
    return tuple(acting)


def _outside(sigma: float, start: Any, end: Any) -> bool:
    return (start is not None and sigma > start) or (end is not None and sigma < end)


def _reason_to_stand_aside(guider: Any, model_options: dict) -> str | None:
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    present = {name for table in wrappers.values() for name in table} | set(options)
    if found := sorted(present & set(OTHER_CACHES)):
        return f"{found[0]} is also on this model: this step cache is inactive"
    if CAUSAL_KEY in options or hasattr(guider.inner_model.diffusion_model, "init_kv_caches"):
        return "a causal model writes its KV cache in every pass: no call can be skipped"
    hooks = [
        hook
        for conds in guider.conds.values()
        for cond in conds
        for hook in getattr(cond.get("hooks"), "hooks", ())
    ]
    if any(getattr(getattr(hook, "hook_keyframe", None), "keyframes", ()) for hook in hooks):
        return "a hook changes the weights during the run, which cannot be predicted"
    return None
