"""Reads a MODEL, a VAE and the device for a memory plan, and applies the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ...kernels.checkpoints.wan_shapes import detect_config
from ...kernels.errors import FrugalError
from ...kernels.memory import fit
from ...kernels.memory.active_plan import ActivePlan
from ...kernels.memory.cross_kv_report import ContextPlan
from ...kernels.memory.doctor import SLOW_ATTENTION
from ...kernels.memory.plan import (
    BUFFERS,
    CAUSAL_KV,
    CROSS_KV,
    TEXT,
    WEIGHTS,
    WORK,
    Decoding,
    Job,
    MemoryPlan,
    Phase,
    Weights,
    make_plan,
)
from ...kernels.report import LoadReport, megabytes
from .._comfy import CONTEXT_KEY, EXPERTS_KEY, PLAN_KEY, compute_dtype, experts_of, show_text
from . import causal_trace, doctor_run, dynamic_vram, main_memory_run, run_report_run
from .chunked_blocks import ActiveOptions, forwards
from .meta_models import ForwardPeaks, check, decoded
from .policy import Policy

GB = 10**9


def job_of(latent: dict | None, width: int, height: int, frames: int, batch: int, guided: bool):
    """The Job of a LATENT [B, 16, T, H, W], or of the numbers if there is none."""
    if latent is None:
        return Job(width, height, frames, batch, guided)
    samples = latent["samples"]
    if samples.ndim != 5:
        raise FrugalError(
            f"the LATENT has {samples.ndim} dimensions",
            "5, [batch, channels, frames, height, width]",
            "connect an empty Wan latent, or none and set width, height and frames",
        )
    b, _, t, h, w = samples.shape
    return Job(w * 8, h * 8, (t - 1) * 4 + 1, b, guided)


def plan_of(
    model: Any, job: Job, budget_gb: float, vae: Any = None, clip: Any = None, block: int = 3
) -> tuple[MemoryPlan, ForwardPeaks]:
    """The plan of a run of `model`, and the peaks that it rests on. budget_gb: 10^9 bytes, 0 for
    all that ComfyUI could have. block: latent frames that a causal model makes at a time. Raises
    FrugalError for models that are not Wan.
    """
    check(model.model, causal=True)
    device = model.load_device
    budget, budget_from = int(budget_gb * GB), "budget typed in"
    if not budget_gb:
        budget, budget_from = available(device), f"free for ComfyUI on {device}"
    notes = ["counted are tensors; kernels' own workspaces and the CUDA context come on top"]
    if device.type != "cpu":
        notes.insert(0, dynamic_vram.note(model))
    if doctor_run.active_attention() in SLOW_ATTENTION and device.type != "cpu":
        notes.append(
            f"attention '{doctor_run.active_attention()}' makes scores that are not counted: use "
            "--use-pytorch-cross-attention"
        )
    options, latents = causal_trace.options_of(model), None
    if options is None:
        peaks = ForwardPeaks(model.model, device)
    else:
        job = replace(job, block=block)
        peaks = causal_trace.peaks_of(model.model, device, options, job)
    weights, said = held_by(model, job)
    if isinstance(peaks, causal_trace.CausalPeaks):
        memory = peaks.memory(job.batch, job.latent)
        weights = replace(weights, caches={**weights.caches, CAUSAL_KV: memory.pages})
        latents = memory.latents(*job.latent[1:])
        notes += peaks.notes(job)
    plan = make_plan(
        title_of(model),
        job,
        weights,
        lambda memory_options: peaks.of_job(job, memory_options),
        budget,
        budget_from,
        None if clip is None else encoder_of(clip),
        None if vae is None else decoding_of(vae, job),
        [*notes, *said],
        latents,
    )
    held = main_memory_run.of(model, clip)
    if held is not None:
        plan = replace(plan, main_memory=held, advice=(*plan.advice, *held.advice()))
    if isinstance(peaks, causal_trace.CausalPeaks):
        plan = replace(plan, advice=(*peaks.advice(plan), *plan.advice))
    return plan, peaks


def apply(model: Any, plan: MemoryPlan, peaks: ForwardPeaks, limit: bool, node: str | None) -> Any:
    """A clone of `model` that works as planned; of two experts both do. limit: keep its weights
    within the budget too. The plan is attached under PLAN_KEY, as an ActivePlan.
    """

    in_force = ActivePlan(plan)

    def policy(of: Any, changes: list[str], say: Callable[[str], None]) -> Policy:
        budget = plan.budget if limit else None
        buffers = BUFFERS * weights_of(of).largest if limit else 0
        return Policy(
            ActiveOptions.of(plan.memory_options), copy.copy(peaks), budget, say, changes, buffers
        )

    def show(line: str) -> None:
        show_text(node, line)

    def show_too(line: str) -> None:
        # The second expert's run is inside the first one's, and so are its changes.
        in_force.changes.append(line)
        show_text(node, line)

    ours = policy(model, in_force.changes, show)
    clone, paths = _working(model, ours)
    switch = experts_of(model)
    if switch is not None:
        # What is put on a pair after it was joined must be on its first expert too, the very same.
        high = switch.high.clone()
        for path in paths:
            high.add_object_patch(path, clone.object_patches[path])
        ours.attach(high)
        switch = copy.copy(switch)
        low = switch.low
        switch.high, switch.low = high, _working(low, policy(low, [], show_too))[0]
        clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, EXPERTS_KEY)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, EXPERTS_KEY, switch)
    clone.set_attachments(PLAN_KEY, in_force)
    return clone


def _working(model: Any, policy: Policy) -> tuple[Any, list[str]]:
    """A clone that works by the policy, and the paths of its forwards that are in pieces."""
    clone, paths, top = model.clone(), [], "diffusion_model."
    for path, forward in list(
        forwards(
            clone.model.diffusion_model,
            policy.state,
            lambda path: clone.get_model_object(top + path),
        )
    ):
        clone.add_object_patch(top + path, forward)
        paths.append(top + path)
    policy.attach(clone)
    return clone, paths


def available(device: Any) -> int:
    """Bytes that a run may use on `device`."""
    reserved = 0 if device.type == "cpu" else comfy.model_management.extra_reserved_memory()
    return run_report_run.obtainable(device) - int(reserved)


def title_of(model: Any) -> str:
    """The name of the file if the loader left it, else the kind of model."""
    found = run_report_run.model_facts(model)
    return next(iter(found.files), found.title) if isinstance(found, LoadReport) else found.title


def held_by(model: Any, job: Job) -> tuple[Weights, list[str]]:
    """What the MODEL's weights take, and notes on them. Of two experts, which ComfyUI loads one at
    a time, it is the larger.
    """
    switch = experts_of(model)
    if switch is None:
        return weights_of(model, job.guided), _context_notes(model)
    pair = [weights_of(each, job.guided) for each in (switch.high, switch.low)]
    high, low = (megabytes(each.total) for each in pair)
    note = (
        f"two experts, one at a time on the device: high noise {high}, low noise {low}; main "
        "memory keeps the other, and the switch reads it once"
    )
    larger = max(pair, key=lambda each: each.total + sum(each.caches.values()))
    # A LoRA or a cache may be on one of them only.
    return larger, [note, *dict.fromkeys(_context_notes(switch.high) + _context_notes(switch.low))]


def weights_of(model: Any, guided: bool = True) -> Weights:
    """What the MODEL's weights take, by format."""
    diffusion = model.model.diffusion_model
    dtype = compute_dtype(model.model)
    stored, multiplied = [0], [0]
    dynamic = dynamic_vram.is_dynamic(model)
    for module in diffusion.modules():
        own = list(module.parameters(recurse=False))
        stored.append(sum(each.nbytes for each in own))
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        loaded = dynamic_vram.dtype_of(module, "weight") if dynamic else weight.dtype
        if hasattr(weight, "_qdata"):
            # Older versions give a packed weight the shape of its words.
            multiplied.append(module.out_features * module.in_features * dtype.itemsize)
        elif loaded != dtype:
            multiplied.append(weight.numel() * dtype.itemsize)
    found = run_report_run.model_facts(model)
    shapes = {name: tuple(each.shape) for name, each in diffusion.named_parameters()}
    try:
        config = detect_config("the MODEL", shapes)
        w4a8 = None if config.relative else fit.wan_bytes(config, "W4A8")
    except FrugalError:
        w4a8 = None
    context, caches = _context_of(model), {}
    if context is not None:
        caches[CROSS_KV] = context.kept(2 if guided else 1, diffusion.dim * dtype.itemsize)
    return Weights(
        dynamic_vram.size(model), found.formats, max(stored), max(multiplied), w4a8, caches
    )


def _context_of(model: Any) -> ContextPlan | None:
    """What Cache Cross-Attention K/V keeps in a run of this MODEL, None without that node."""
    present = CONTEXT_KEY in model.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {})
    return model.get_attachment(CONTEXT_KEY) if present else None


def _context_notes(model: Any) -> list[str]:
    context = _context_of(model)
    if context is None:
        return []
    return [
        f"cross-attention cache: {megabytes(context.weight_bytes)} of these weights are read in "
        "the first steps only, once per prompt, and may leave the device then"
    ]


def encoder_of(clip: Any) -> Phase:
    """The text encoder's phase: its weights, and the work on one prompt."""
    return Phase(TEXT, {WEIGHTS: dynamic_vram.size(clip.patcher), WORK: fit.ENCODER_WORK[1]})


def decoding_of(vae: Any, job: Job) -> Decoding:
    """Decoding one video; ComfyUI decodes a batch one after the other if it does not fit."""
    whole, stream, tiled, how = decoded(vae, job.latent)
    return Decoding(dynamic_vram.size(vae.patcher), whole, stream, tiled, how)
