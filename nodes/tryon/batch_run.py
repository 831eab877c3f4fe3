"""Many try-ons in one go: encode each picture once, sample in groups that fit, give nothing up.

Three passes, so that VAE and UNet take turns on the device once and not once per picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.tryon import batching, canvas, latents, pictures, plan
from .._comfy import compute_dtype
from .._memory import is_out_of_memory
from . import glue, item_noise, save_partial
from . import sigmas as sampling


@dataclass(frozen=True)
class Settings:
    """How to sample and to lay the pictures back; see the node's inputs.

    sigmas: [rounds + 1]. budget: bytes for the work of the UNet, 0 = what ComfyUI says is free.
    largest: most pictures per group.
    """

    cfg: float
    seed: int
    sampler: Any
    sigmas: torch.Tensor
    fit: str
    context: int
    threshold: float
    blur: float
    color_match: bool
    budget: int
    largest: int


@dataclass(frozen=True)
class Scene:
    """One picture to make: numbers of its person and its garment, size (H, W) of its canvas."""

    person: int
    garment: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What a run did. groups: pictures per forward, in order. seconds: by pass."""

    pictures: int
    sizes: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]
    planned: tuple[int, ...]
    halvings: int
    persons_encoded: int
    garments_encoded: int
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def text(self) -> str:
        canvases = ", ".join(f"{w} x {h} px" for h, w in self.sizes)
        lines = [
            f"{self.pictures} pictures on canvases of {canvases}",
            f"sampled in groups of {', '.join(map(str, self.groups))} (planned at most "
            f"{', '.join(map(str, self.planned))}; memory ran out {self.halvings} times)",
            f"encoded {self.persons_encoded} persons and {self.garments_encoded} garments",
            ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items()),
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def single_pictures(batches: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Batches [B, ...] of any sizes -> [1, ...] each, in order; a mask [H, W] counts as one."""
    whole = [batch[None] if batch.ndim == 2 else batch for batch in batches if batch is not None]
    return [batch[i : i + 1] for batch in whole for i in range(len(batch))]


def scenes_of(
    persons: int, garments: int, combine: str, widths: list[int], heights: list[int]
) -> list[Scene]:
    """The pictures in order; widths and heights (px) are one for all persons, or one per person."""
    for name, values in (("width", widths), ("height", heights)):
        if len(values) not in (1, persons):
            raise FrugalError(
                f"{name} is a list of {len(values)} for {persons} persons",
                "one number for all, or one per person",
                f"connect one {name}, or as many as there are persons",
            )
    sizes = list(
        zip(heights * (persons // len(heights)), widths * (persons // len(widths)), strict=True)
    )
    return [Scene(p, g, sizes[p]) for p, g in batching.jobs(persons, garments, combine)]


def schedule(model, steps: int, eta: float, sampler, sigmas) -> tuple[Any, torch.Tensor]:
    """(SAMPLER, SIGMAS): the ones connected, else CatVTON's own."""
    if (sampler is None) != (sigmas is None):
        missing = "sampler" if sampler is None else "sigmas"
        raise FrugalError(
            f"{missing} is not connected", "both sampler and sigmas, or neither", "connect both"
        )
    if sampler is not None:
        return sampler, sigmas
    levels, own = sampling.reference_schedule(model, steps, eta)
    return own, levels


def free_bytes(model) -> int:
    """What ComfyUI reports free where the model runs, less the weights that are still to come."""
    free = comfy.model_management.get_free_memory(model.load_device)
    return int(free - max(0, model.model_size() - model.loaded_size()))


def bytes_per_picture(model, size: tuple[int, int], factor: int, guided: bool) -> int:
    """The traced peak of one picture, or what ComfyUI will set aside for it where that is more."""
    dtype = compute_dtype(model.model)
    traced = plan.bytes_per_picture(size, dtype.itemsize, guided)
    # ComfyUI sets aside for both sides of the guidance even when only one is run.
    shape = [plan.GUIDED, 4, 2 * size[0] // factor, size[1] // factor]
    return max(traced, int(model.model.memory_required(shape)))


class Batch:
    """One run over `scenes`; persons, masks and garments are lists of single pictures.

    One mask serves all persons. Nothing of a run outlives it, and the model is not changed.
    """

    def __init__(self, model, vae, persons, masks, garments, scenes: list[Scene], how: Settings):
        glue.require_masked_model(model)
        if len(masks) not in (1, len(persons)):
            raise FrugalError(
                f"there are {len(masks)} masks for {len(persons)} persons",
                "one per person, or a single one for all",
                "connect as many masks as persons",
            )
        self.model, self.vae, self.how, self.scenes = model, vae, how, scenes
        self.persons, self.masks, self.garments = persons, masks * len(persons), garments
        self.factor = glue.vae_factor(vae)
        self.placed = batching.OnceEach(self._place)
        self.upper = batching.OnceEach(lambda shown, mask, _: glue.encode_person(shown, mask, vae))
        self.lower = batching.OnceEach(lambda g, size: glue.encode(vae, canvas.on_white(g, size)))
        self.outcome, self.planned, self.notes = batching.Outcome(), [], []
        self.rounds = max(1, len(how.sigmas) - 1)
        self.bar = comfy.utils.ProgressBar(len(scenes) * self.rounds)

    def run(self) -> tuple[list[torch.Tensor], Report]:
        """Finished photos [1, H, W, 3] in the order of the scenes.

        Raises FrugalError when one picture alone does not fit into memory. On that and on any
        error but a cancel, what was finished is written to the output folder first.
        """
        times, finished = [time.perf_counter()], {}
        self._encode()
        times.append(time.perf_counter())
        try:
            self._sample()
            times.append(time.perf_counter())
            for number in range(len(self.scenes)):
                finished[number] = self._finish(number)
        except Exception as error:
            if isinstance(error, comfy.model_management.InterruptProcessingException):
                raise
            kept = save_partial.save(self._finish_others(finished))
            if isinstance(error, FrugalError):
                raise FrugalError(error.found, error.expected, f"{error.do}; {kept}") from error
            LOG.warning("[Frugal] the batch stopped at '%s'; %s.", error, kept)
            raise
        times.append(time.perf_counter())
        passes = zip(("encode", "sample", "decode"), times, times[1:], strict=False)
        report = Report(
            len(self.scenes),
            tuple(batching.buckets([scene.size for scene in self.scenes])),
            tuple(self.outcome.groups),
            tuple(self.planned),
            self.outcome.halvings,
            self.upper.made,
            self.lower.made,
            {name: after - before for name, before, after in passes},
            tuple(self.notes),
        )
        return [finished[number] for number in range(len(self.scenes))], report

    def _finish_others(self, finished: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """`finished` and what else can be finished of the sampled pictures, after an error."""
        for number in self.outcome.results:
            if number not in finished:
                try:
                    finished[number] = self._finish(number)
                except (FrugalError, RuntimeError, MemoryError) as error:
                    LOG.warning("[Frugal] picture %d is lost: %s", number + 1, error)
        return finished

    def _place(self, person: int, size: tuple[int, int]):
        how = self.how
        args = (size, how.fit, how.context, how.threshold)
        return canvas.place_person(self.persons[person], self.masks[person], *args)

    def _canvas(self, scene: Scene):
        return self.placed((scene.person, scene.size), scene.person, scene.size)

    def _garment(self, number: int) -> torch.Tensor:
        return pictures.as_rgb(self.garments[number], "garment")

    def _encode(self) -> None:
        for scene in self.scenes:  # a picture that cannot be used is found before any work
            latents.check_size(scene.size, self.factor)
            self._canvas(scene)
            self._garment(scene.garment)
        for scene in self.scenes:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._latents(scene)

    def _latents(self, scene: Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(person, garment, mask) at latent size, [1, ...] each."""
        upper, small = self.upper((scene.person, scene.size), *self._canvas(scene))
        garment = self._garment(scene.garment)
        return upper, self.lower((scene.garment, scene.size), garment, scene.size), small

    def _sample(self) -> None:
        batched = item_noise.can_batch(self.how.sampler)
        if not batched and len(self.scenes) > 1:
            self.notes.append("this sampler draws its noise per batch, so pictures go one by one")
        for size, numbers in batching.buckets([scene.size for scene in self.scenes]).items():
            each = bytes_per_picture(self.model, size, self.factor, self.how.cfg > 1)
            free = self.how.budget or free_bytes(self.model)
            count = plan.micro_batch(free, each, self.how.largest if batched else 1)
            self.planned.append(min(count, len(numbers)))
            recover = comfy.model_management.soft_empty_cache
            batching.run_halving(
                numbers, count, self._group, is_out_of_memory, recover, self.outcome
            )
            if self.outcome.failed is not None:
                self._refuse(size, free)

    def _group(self, numbers: list[int]) -> list[torch.Tensor]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        how = self.how
        parts = zip(*(self._latents(self.scenes[number]) for number in numbers), strict=True)
        positive, negative, start = glue.assemble(*(torch.cat(part) for part in parts))
        seeds = [item_noise.seed_of(how.seed, number) for number in numbers]
        sampler = how.sampler if len(seeds) == 1 else item_noise.per_item(how.sampler, seeds)
        before = len(self.outcome.results) * self.rounds
        samples = comfy.sample.sample_custom(
            self.model,
            item_noise.start_noise(start["samples"], seeds),
            how.cfg,
            sampler,
            how.sigmas,
            positive,
            negative,
            start["samples"],
            callback=lambda step, *_: self.bar.update_absolute(before + (step + 1) * len(seeds)),
            disable_pbar=True,
            seed=seeds[0],
        )
        return list(samples.split(1))

    def _finish(self, number: int) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        scene = self.scenes[number]
        samples = {"samples": self.outcome.results[number]}
        painted = glue.decode(samples, self.vae, scene.size)
        frame = self._canvas(scene)[2]
        return canvas.stitch(painted, frame, self.how.blur, self.how.color_match)

    def _refuse(self, size: tuple[int, int], free: int) -> None:
        need = bytes_per_picture(self.model, size, self.factor, self.how.cfg > 1)
        raise FrugalError(
            f"memory ran out on picture {self.outcome.failed + 1} alone, on a canvas of "
            f"{size[1]} x {size[0]} px",
            f"about {need / 2**30:.1f} GiB besides the weights ({free / 2**30:.1f} GiB were free)",
            "choose a smaller canvas, a smaller weight_dtype, or start ComfyUI with --lowvram",
        )
