"""A whole video by the causal sampler: a session before and after, and prompts that change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...kernels.causal.cache import VideoCache
from ...kernels.causal.noise_seed import FRAME, STEP, noise_seed
from ...kernels.causal.presets import AS_SET, CAUSAL_PRESETS, CausalPreset
from ...kernels.errors import FrugalError
from .._comfy import runs_negative
from . import model_run as causal_model
from . import sampler_run as causal_sampler
from .live_decode import LiveVideo
from .sampler_run import Job

FRAMES_PER_SECOND = 4  # latent frames: Wan's 16 pictures a second, 4 in each
Schedule = tuple[tuple[float, Any], ...]  # (second of this run, conditioning)


@dataclass(frozen=True)
class Settings:
    """As on the node. recache: recompute the kept frames when the prompt changes. keep: leave a
    session that can go on. preset: of CAUSAL_PRESETS, in place of steps, scheduler, frames per
    block and the model's window, sink and positions.
    """

    seed: int
    steps: int
    cfg: float
    scheduler: str
    frames_per_block: int
    recache: bool = True
    keep: bool = False
    preset: str = AS_SET


def sampler(frames_per_block: int, job: Job | None = None) -> comfy.samplers.KSAMPLER:
    """The causal sampler as ComfyUI's SAMPLER."""
    return comfy.samplers.KSAMPLER(
        causal_sampler.sample_causal, {"frames_per_block": frames_per_block, "job": job}
    )


def make_video(
    model: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    settings: Settings,
    session: VideoCache | None = None,
    prompts: Schedule = (),
    start: dict[str, Any] | None = None,
    live: LiveVideo | None = None,
) -> tuple[dict[str, Any], VideoCache, str]:
    """(latent with the video, session, empty unless it is kept, report).

    latent: [B, 16, T, h, w], its T latent frames are made; with `start`, clean frames a new video
    begins with, those are the first of the T. session: the video to go on with, left unchanged.
    live: gets the T latents as they are made, to show and to write them.
    Raises FrugalError for what cannot be made.
    """
    options = model.model_options.get("transformer_options", {}).get(causal_model.OPTIONS)
    if options is None:
        raise FrugalError(
            "a model that is not causal",
            "one from Causal Model",
            "put that node between the loader and the sampler",
        )
    if session is not None and not session.kept:
        raise FrugalError(
            "an empty session", "one with frames", "turn keep_session on in the sampler before"
        )
    if latent.get("noise_mask") is not None:
        raise FrugalError("a latent with a noise mask", "none", "remove the mask")
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    before = None if start is None else start["samples"]
    samples = _without_start(samples, before, session)
    model, preset = model.clone(), CAUSAL_PRESETS.get(settings.preset)
    if preset is not None:
        settings = replace(settings, frames_per_block=preset.block)
        options = replace(options, window=preset.window, sink=preset.sink, relative=True)
        model.model_options["transformer_options"][causal_model.OPTIONS] = options
    model.model_options["transformer_options"][causal_model.NEEDS] = causal_model.Needs(
        settings.frames_per_block,
        len(session.kept) if session else _given(before),
        2 if runs_negative(model, settings.cfg) else 1,
    )
    job = Job(keep=True, live=live, step_seed=lambda seed, *at: noise_seed(seed, STEP, *at))
    if preset is None:
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), settings.scheduler, settings.steps
        )
    else:
        sigmas, job.recompute = torch.tensor(preset.levels), preset.recompute
        job.first = torch.tensor(preset.first) if preset.first else None
    if live is not None:
        live.start((*samples.shape[:2], samples.shape[2] + _given(before), *samples.shape[3:]))
    try:
        if session is not None:
            job.cache = session.fork(options)
        if before is not None:
            job.prefix = model.model.process_latent_in(before)
        parts = segments(positive, prompts, samples.shape[2], settings.frames_per_block)
        _check_start_image(parts)
        blocks = sum(-(-(end - begin) // settings.frames_per_block) for begin, end, _ in parts)
        more = (
            0
            if job.first is None or session or before is not None
            else len(job.first) - len(sigmas)
        )
        callback = _counting(model, blocks * (len(sigmas) - 1) + more, live)
        made = [] if before is None else [before.to(samples.device, samples.dtype)]
        if live is not None and made:
            live.add(made[0])
        for index, (begin, end, prompt) in enumerate(parts):
            job.keep = settings.keep or index + 1 < len(parts)
            mark = _mark(prompt, negative)
            if job.cache is not None:
                job.recache = settings.recache and job.cache.prompt != mark
                job.may_recache = settings.recache
            part = samples[:, :, begin:end]
            made.append(
                comfy.sample.sample_custom(
                    model, _noise(part, settings.seed, _first(job), latent.get("batch_index")),
                    settings.cfg,
                    sampler(settings.frames_per_block, job), sigmas, prompt, negative, part,
                    callback=callback, seed=settings.seed,
                ).to(samples.device)
            )  # fmt: skip
            job.prefix = None
            job.cache.prompt = mark
        report = causal_sampler.text(job) + _about(settings.preset, preset)
        if not settings.keep:
            job.cache.release()
    except BaseException:
        if job.cache is not None:
            job.cache.release()
        raise
    finally:
        # Nothing stays on the device between runs, where ComfyUI could not count it.
        if job.cache is not None:
            job.cache.offload()
    return {**latent, "samples": torch.cat(made, dim=2)}, job.cache, report


def segments(
    positive: Any, prompts: Schedule, frames: int, block: int
) -> list[tuple[int, int, Any]]:
    """(first frame, end, conditioning) of the parts of a run of `frames` latent frames. A prompt
    begins with the first block at or after its second. Raises FrugalError for two at one time.
    """
    starts: dict[int, Any] = {0: positive}
    for second, prompt in sorted(prompts, key=lambda each: each[0]):
        frame = -(-round(second * FRAMES_PER_SECOND) // block) * block
        if frame in starts and frame:
            raise FrugalError(
                f"two prompts for the block at latent frame {frame}",
                f"at least {block / FRAMES_PER_SECOND:g} seconds between prompts",
                "move one of them",
            )
        if frame < frames:
            starts[frame] = prompt
    edges = [*sorted(starts), frames]
    return [(begin, end, starts[begin]) for begin, end in pairwise(edges)]


def _about(name: str, preset: CausalPreset | None) -> str:
    if preset is None:
        return ""
    levels = ", ".join(f"{level:.3g}" for level in preset.levels[:-1])
    first = f", first block {len(preset.first) - 1} levels" if preset.first else ""
    return (
        f"\n{name}: noise levels {levels}{first}; blocks of {preset.block}, window "
        f"{preset.window}, sink {preset.sink}, relative positions, instead of the inputs"
        + ("; cached frames recomputed before every block" if preset.recompute else "")
    )


def _check_start_image(parts: list[tuple[int, int, Any]]) -> None:
    if len(parts) > 1 and any("concat_latent_image" in extra for *_, c in parts for _, extra in c):
        raise FrugalError(
            "a start image and prompts that change",
            "one of them",
            "make each part in a run of its own, from the session of the one before",
        )


def _without_start(
    samples: torch.Tensor, before: torch.Tensor | None, session: VideoCache | None
) -> torch.Tensor:
    if before is None:
        return samples
    if session is not None:
        raise FrugalError(
            "a session and start frames", "one of them", "remove one: a session has its frames"
        )
    given, wanted = before.shape, samples.shape
    if given[:2] + given[3:] != wanted[:2] + wanted[3:] or given[2] >= wanted[2]:
        raise FrugalError(
            f"start frames {tuple(given)} for a latent {tuple(wanted)}",
            "the same size, and fewer frames than the latent",
            "encode the start image at the video's size, and make the latent longer",
        )
    return samples[:, :, given[2] :]


def _given(frames: torch.Tensor | None) -> int:
    return 0 if frames is None else frames.shape[2]


def _first(job: Job) -> int:
    return _given(job.prefix) + (0 if job.cache is None else job.cache.next_frame)


def _noise(
    samples: torch.Tensor, seed: int, first: int, batch_index: list[int] | None
) -> torch.Tensor:
    """Noise of a frame by its number, so that a video is the same in one run or several."""
    frame = samples[:, :, :1]
    each = [
        comfy.sample.prepare_noise(frame, noise_seed(seed, FRAME, first + i), batch_index)
        for i in range(samples.shape[2])
    ]
    return torch.cat(each, dim=2)


def _counting(model: Any, total: int, live: LiveVideo | None) -> Callable[..., None]:
    """A sampler's callback over all parts of a video. Once pictures were decoded, the last of them
    is shown in place of a guess at the block in work.
    """
    show, done = latent_preview.prepare_callback(model, total), 0
    bar = comfy.utils.ProgressBar(total)

    def callback(step, x0, x, steps):
        nonlocal done
        if live is not None and live.picture is not None:
            bar.update_absolute(done + 1, total, live.picture)
        else:
            show(done, x0, x, total)
        done += 1

    return callback


def _mark(*conditionings: Any) -> str:
    """Tells prompts apart by what was encoded."""
    digest = hashlib.sha256()
    for conditioning in conditionings:
        for tensor, _ in conditioning:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
