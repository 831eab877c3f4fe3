"""Reads a MODEL, a VAE and the device for a memory plan, and applies the plan."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ...kernels.checkpoints.wan_shapes import IMAGE_TOKENS, TEXT_TOKENS, detect_config
from ...kernels.errors import FrugalError
from ...kernels.plan import fit
from ...kernels.plan.doctor import SLOW_ATTENTION
from ...kernels.plan.memory import (
    CROSS_KV,
    TEXT,
    WEIGHTS,
    WORK,
    Decoding,
    Job,
    MemoryPlan,
    Phase,
    Weights,
    kv_bytes,
    make_plan,
)
from ...kernels.report import LoadReport
from .._comfy import compute_dtype, show_text
from . import facts, glue
from .chunking import InForce, forwards
from .meta import ForwardPeaks, decoded
from .policy import Policy

GB = 10**9
PROMPTS = 2  # the wanted and the unwanted one
# The name under which Constant Context follows a run.
CONTEXT = "frugal.constant_context"


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
    model: Any, job: Job, budget_gb: float, vae: Any = None, clip: Any = None
) -> tuple[MemoryPlan, ForwardPeaks]:
    """The plan of a run of `model`, and the peaks that it rests on. budget_gb: 10^9 bytes, 0 for
    all that ComfyUI could have. Raises FrugalError for models that are not Wan.
    """
    device = model.load_device
    peaks = ForwardPeaks(model.model, device)
    budget, budget_from = int(budget_gb * GB), "budget typed in"
    if not budget_gb:
        budget, budget_from = available(device), f"free for ComfyUI on {device}"
    notes = ["counted are tensors; kernels' own workspaces and the CUDA context come on top"]
    if facts.active_attention() in SLOW_ATTENTION and device.type != "cpu":
        notes.append(
            f"attention '{facts.active_attention()}' makes scores that are not counted: use "
            "--use-pytorch-cross-attention"
        )
    plan = make_plan(
        title_of(model),
        job,
        weights_of(model),
        lambda switches: peaks.of_job(job, switches),
        budget,
        budget_from,
        None if clip is None else encoder_of(clip),
        None if vae is None else decoding_of(vae, job),
        notes,
    )
    return plan, peaks


def apply(model: Any, plan: MemoryPlan, peaks: ForwardPeaks, limit: bool, node: str | None) -> Any:
    """A clone of `model` that works as planned. limit: keep its weights within the budget too."""
    clone = model.clone()
    state = InForce.of(plan.switches)
    top = "diffusion_model."
    for path, forward in list(
        forwards(
            clone.model.diffusion_model, state, lambda path: clone.get_model_object(top + path)
        )
    ):
        clone.add_object_patch(top + path, forward)
    budget = plan.budget if limit else None
    Policy(state, peaks, budget, lambda line: show_text(node, line)).attach(clone)
    return clone


def available(device: Any) -> int:
    """Bytes that ComfyUI has on `device` once it has put its models away."""
    management = comfy.model_management
    free = management.get_free_memory(device)
    if device.type != "cpu":
        loaded = (each for each in management.current_loaded_models if each.device == device)
        free += sum(each.model_loaded_memory() for each in loaded)
        free -= management.extra_reserved_memory()
    return int(free)


def title_of(model: Any) -> str:
    """The name of the file if the loader left it, else the kind of model."""
    found = glue.model_facts(model)
    return next(iter(found.files), found.title) if isinstance(found, LoadReport) else found.title


def weights_of(model: Any) -> Weights:
    """What the MODEL's weights take, by format."""
    diffusion = model.model.diffusion_model
    dtype = compute_dtype(model.model)
    stored, multiplied = [0], [0]
    for module in diffusion.modules():
        own = list(module.parameters(recurse=False))
        stored.append(sum(each.nbytes for each in own))
        weight = getattr(module, "weight", None)
        if weight is not None and (weight.dtype != dtype or hasattr(weight, "_qdata")):
            multiplied.append(weight.numel() * dtype.itemsize)
    found = glue.model_facts(model)
    shapes = {name: tuple(each.shape) for name, each in diffusion.named_parameters()}
    try:
        w4a8 = fit.wan_bytes(detect_config("the MODEL", shapes), "W4A8")
    except FrugalError:
        w4a8 = None
    caches = {}
    if model.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {}).get(CONTEXT):
        image = IMAGE_TOKENS if diffusion.img_emb is not None else 0
        caches[CROSS_KV] = PROMPTS * kv_bytes(
            len(diffusion.blocks), TEXT_TOKENS + image, diffusion.dim, dtype.itemsize
        )
    return Weights(
        int(model.model_size()), found.formats, max(stored), max(multiplied), w4a8, caches
    )


def encoder_of(clip: Any) -> Phase:
    """The text encoder's phase: its weights, and the work on one prompt."""
    return Phase(TEXT, {WEIGHTS: int(clip.patcher.model_size()), WORK: fit.ENCODER_WORK[1]})


def decoding_of(vae: Any, job: Job) -> Decoding:
    """Decoding one video; ComfyUI decodes a batch one after the other if it does not fit."""
    whole, stream, tiled, how = decoded(vae, job.latent)
    return Decoding(int(vae.patcher.model_size()), whole, stream, tiled, how)
