"""The sampler function: one block of frames after the other, each denoised beside the clean ones.

Per block: denoise to clean at sigma_i, add fresh noise of sigma_{i+1}, and so on (the flow
x = (1 - sigma) x0 + sigma noise, Self Forcing, arXiv 2506.08009). A last pass at sigma 0 gives the
clean block's keys and values, which stay in the cache; the noisy ones never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.model_management
import torch

from ...kernels.causal.cache import VideoCache
from ...kernels.causal.storage import MODEL
from ...kernels.causal.strategies import CHUNK_FRAMES, CHUNKED, PAGED
from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from .active_run import CausalRun, load_again
from .live_decode import LiveVideo
from .model_run import OPTIONS, compute_dtype, page_format
from .weights_mark import weights_of


def as_comfyui(seed: int, block: int, step: int) -> int:
    """The seed that ComfyUI's own sampler for causal models takes, for the same numbers."""
    return (seed + 1000 * block + step) % 2**64


@dataclass
class Job:
    """What a run starts from and leaves.

    cache: the video to extend, changed by the run; None for a new one. prefix: clean frames [B, C,
    n, h, w], as the network sees them, that a new video starts with. recache: compute the kept
    frames again first, for another prompt. may_recache: do so too where the model is another one.
    recompute: do so before every block. first: noise levels of the first block of a video, if
    others than the rest. keep: the last block's keys and values too, to continue the video. live:
    takes each clean block as a LATENT has it. step_seed: of the fresh noise after a step, from
    (seed, block, step). note: for the report. calls, frames: of the model,
    and made, so far.
    """

    cache: VideoCache | None = None
    prefix: torch.Tensor | None = None
    recache: bool = False
    may_recache: bool = False
    recompute: bool = False
    first: torch.Tensor | None = None
    keep: bool = False
    live: LiveVideo | None = None
    step_seed: Callable[[int, int, int], int] = as_comfyui
    note: str = ""
    calls: int = 0
    frames: int = 0


@torch.no_grad()
def sample_causal(
    model, x, sigmas, extra_args=None, callback=None, disable=None, frames_per_block=3, job=None
):
    """A sampler function of ComfyUI. x: noise [B, C, T, h, w]; sigmas [steps + 1] down to 0.
    Returns clean latents of that shape. Raises FrugalError for what cannot be made block by block.
    """
    extra_args = dict(extra_args or {})
    guider, own = model.inner_model, job is None
    job = job or Job()
    options = extra_args.get("model_options", {}).get("transformer_options", {}).get(OPTIONS)
    _check(x, sigmas, extra_args, options, guider)
    network = guider.inner_model.diffusion_model
    dtype = compute_dtype(guider.model_patcher)
    fmt = page_format(network, x.shape, dtype, options.kind)
    if job.cache is None:
        job.cache = VideoCache(fmt, len(network.blocks), x.device, options)
    elif (job.cache.fmt, job.cache.layers) != (fmt, len(network.blocks)):
        raise FrugalError(
            f"a session of {_size(job.cache.fmt, job.cache.layers)} and now "
            f"{_size(fmt, len(network.blocks))}",
            "the same model, size, batch and compute type",
            "start a new video, or take the size of the session",
        )
    _check_weights(job, weights_of(guider.model_patcher))
    try:
        return _make(model, x, sigmas, extra_args, callback, frames_per_block, job)
    finally:
        if own:
            job.cache.release()


def _check_weights(job: Job, now: dict[str, str]) -> None:
    """Frames made with one model do not go on with another unseen: what the cache keeps of them is
    computed again, or it is refused.
    """
    cache = job.cache
    assert cache is not None
    if cache.kept and cache.weights and cache.weights["mark"] != now["mark"]:
        was = f"{cache.weights['name']} ({cache.weights['mark']})"
        other = f"a session made with {was}, and now {now['name']} ({now['mark']})"
        if not (job.may_recache or job.recompute):
            raise FrugalError(
                other,
                "the same weights and LoRAs",
                "turn recache on, or connect the model that made the session",
            )
        job.recache = True
        job.note = f"{other}: the cached frames were recomputed with it"
    cache.weights = now


def _make(model, x, sigmas, extra_args, callback, frames_per_block, job):
    cache, total = job.cache, x.shape[2]
    sides = _sides(model.inner_model, extra_args["model_options"])
    after = total + len(cache.kept) + (0 if job.prefix is None else job.prefix.shape[2])
    # Only now has ComfyUI made room on the device.
    cache.reserve(cache.pages_for(after, sides))
    cache.unpark()
    run = CausalRun(cache, cache.next_frame, total)
    extra_args = run.installed(extra_args)
    ones = x.new_ones([x.shape[0]])

    def remember(clean: torch.Tensor, frames: Sequence[int] | None = None) -> None:
        run.start_block(clean.shape[2], frames)
        with run.cache.writing(clean):
            model(clean, sigmas.new_zeros(1) * ones, **extra_args)

    if job.recache and cache.kept and not job.recompute:
        run.cache = job.cache = recached(cache, remember, run)
        cache = job.cache
    if job.prefix is not None:
        for part in job.prefix.to(x).split(frames_per_block, dim=2):
            remember(part)
        run.first = cache.next_frame
    # The first block of a video may have levels of its own. Read once: that makes the host wait.
    own = sigmas if job.first is None or cache.next_frame else job.first.to(sigmas)
    ends = own.tolist(), sigmas.tolist()
    out, done = torch.zeros_like(x), 0
    blocks = range(0, total, frames_per_block)
    for start in blocks:
        count = min(frames_per_block, total - start)
        block = x[:, :, start : start + count]
        if job.recompute and cache.kept:
            # What the block will not see need not be computed.
            cache.start_block(count)
            run.cache = job.cache = cache = recached(cache, remember, run, frames_per_block)
        run.start_block(count)
        levels, known = (sigmas, ends[1]) if start else (own, ends[0])
        for i in range(len(levels) - 1):
            denoised = model(block, levels[i] * ones, **extra_args)
            if callback is not None:
                # ComfyUI counts the steps of one block.
                scaled = min(done // len(blocks), len(sigmas) - 2)
                callback({"x": block, "i": scaled, "sigma": levels[i],
                          "sigma_hat": levels[i], "denoised": denoised})  # fmt: skip
            done += 1
            seed = job.step_seed(extra_args.get("seed") or 0, cache.blocks_made, i)
            block = _noised(denoised, levels[i + 1], seed) if known[i + 1] else denoised
        out[:, :, start : start + count] = block
        if job.recompute and start + count < total:
            cache.note(block)
        elif job.keep or start + count < total:
            remember(block)
        cache.blocks_made += 1
        if job.live is not None:
            _shown(block, model.inner_model, x.shape, job.live, cache)
    job.calls, job.frames = job.calls + run.calls, job.frames + total
    return out


def _shown(block, guider, shape, live: LiveVideo, cache: VideoCache) -> None:
    """Hand the clean block to `live`, exactly as ComfyUI would return it at the end."""
    management = comfy.model_management
    latent = guider.inner_model.process_latent_out(block.to(torch.float32))
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    before = guider.model_patcher.loaded_size()
    if live.add(latent.to(management.intermediate_device(), dtype)):
        live.count_swap(before - guider.model_patcher.loaded_size())
        if not live.complete:
            load_again(guider, shape, cache.pool.held_bytes)


def recached(cache: VideoCache, remember: Any, run: CausalRun, size: int = 0) -> VideoCache:
    """A cache whose kept frames are recomputed from their clean latents by `remember(clean,
    numbers)`, in the blocks they were made in or `size` at a time. The given cache is empty then.
    """
    groups, clean = cache.blocks(size), dict(cache.clean)
    run.cache = cache.emptied()
    cache.release()
    try:
        for group in groups:
            latent = torch.cat([clean[each.frame] for each in group], dim=2)
            remember(latent.to(cache.device), [each.frame for each in group])
    except BaseException:
        run.cache.release()
        raise
    return run.cache


def _noised(clean: torch.Tensor, sigma: torch.Tensor, seed: int) -> torch.Tensor:
    """The flow at `sigma` from fresh noise, by a generator of its own: the global one is left
    alone.
    """
    make = torch.Generator(device=clean.device).manual_seed(seed)
    noise = torch.randn(clean.shape, generator=make, device=clean.device, dtype=clean.dtype)
    return (1.0 - sigma) * clean + sigma * noise


def _sides(guider: Any, model_options: dict[str, Any]) -> int:
    """Conditions that the guider runs, each with pages of its own."""
    if getattr(guider, "cfg", 0) == 1.0 and not model_options.get("disable_cfg1_optimization"):
        return 1
    return max(1, sum(1 for side in getattr(guider, "conds", {}).values() if side))


def _check(x, sigmas, extra_args, options, guider) -> None:
    if options is None:
        raise FrugalError(
            "a model that is not causal",
            "one from Causal Model",
            "put that node between the loader and the sampler",
        )
    if x.ndim != 5:
        raise FrugalError(f"a latent of {x.ndim} dimensions", "a video latent", "use a Wan latent")
    levels = sigmas.tolist()
    if levels[-1] != 0 or any(after >= before for before, after in pairwise(levels)):
        raise FrugalError(
            f"noise levels from {levels[0]:g} to {levels[-1]:g}",
            "levels that fall down to 0",
            "use the whole schedule: a block must be clean before the next begins",
        )
    if extra_args.get("denoise_mask") is not None:
        raise FrugalError("a latent with a noise mask", "none", "remove the mask")
    if extra_args["model_options"].get("context_handler") is not None:
        raise FrugalError("context windows", "none", "remove that node: the cache is the window")
    for side, conds in getattr(guider, "conds", {}).items():
        if conds is not None and len(conds) > 1:
            raise FrugalError(
                f"{len(conds)} conditionings as {side}", "one", "use the prompt schedule"
            )
        if any(cond.get(part) is not None for cond in conds or () for part in ("area", "mask")):
            raise FrugalError(
                f"a {side} prompt for a part of the picture",
                "prompts for the whole picture",
                "remove the area or mask from the conditioning",
            )


def _size(fmt, layers) -> str:
    samples, tokens, heads, width = fmt.shape
    return f"{layers} layers, {heads} x {width}, {samples} x {tokens} tokens, {fmt.dtype}"


def _way(cache: VideoCache) -> str:
    way = cache.options.way
    if way == CHUNKED:
        return f"{way}, {CHUNK_FRAMES} frames at a time"
    if way == PAGED:
        if cache.paged is None:
            return "gathered, not paged: the cache is in main memory, or was when the session began"
        return cache.paged.text()
    return way


def text(job: Job) -> str:
    """About a job that ran: what was made, what is kept, in bytes, and how pages were attended."""
    cache = job.cache
    assert cache is not None
    pool, options = cache.pool, cache.options
    lines = [
        f"{job.frames} latent frames in {job.calls} model calls",
        f"{len(cache.kept)} of {cache.next_frame} frames in the cache",
        f"cache: {megabytes(pool.peak_bytes)} at most, {len(cache.streams)} condition(s), "
        f"{options.kind} pages of {megabytes(pool.page_bytes)}",
        f"attention over pages: {_way(cache)}",
    ]
    if cache.staging is not None:
        ahead, late = cache.staging.ahead, cache.staging.late
        lines.append(
            f"pages from main memory: {ahead} of {ahead + late} layers were prefetched one "
            f"layer ahead; {megabytes(cache.staging.peak_bytes)} of device memory for two layers"
        )
    if cache.host.held_bytes:
        lines.append(f"main memory for pages: {megabytes(cache.host.held_bytes)} in whole blocks")
    if job.note:
        lines.append(job.note)
    if options.kind != MODEL:
        lines.append(f"rounding of the first block's keys and values: {cache.error:.2%}")
    return "\n".join(lines)
