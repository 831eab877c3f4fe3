"""Many try-ons in one go: encode each picture once, sample in groups that fit, give nothing up.

A round is a handful of pictures: encode, sample, decode, hand over. VAE and UNet take turns on the
device once per round, and what a round needed is dropped before the next, so a thousand pictures
take the memory of one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.model_management
import comfy.sample
import comfy.utils
import torch

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.tryon import batching, blending, canvas, checks, latents, pictures, plan
from .._comfy import compute_dtype
from .._memory import is_out_of_memory
from . import glue, item_noise
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
    blend: str
    budget: int
    largest: int


@dataclass(frozen=True)
class Scene:
    """One picture to make: numbers of its person and its garment, size (H, W) of its canvas."""

    person: int
    garment: int
    size: tuple[int, int]


ROUND = 8  # pictures of a round at least; a group may be larger
KEPT = 64  # latents of persons and of garments that stay, 0.2 MB each at 768 x 1024 px


@dataclass(frozen=True)
class Source:
    """A person or a garment. load() gives a picture [1, H, W, C] and a mask [1, H, W]: what to
    repaint on a person, what is transparent (or None) in a garment. It may raise FrugalError.
    """

    name: str
    load: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


class Delivery(Protocol):
    """Where finished pictures go."""

    def has(self, number: int) -> bool:
        """Whether picture `number` is there already, from an earlier run."""
        ...

    def add(self, number: int, picture: torch.Tensor) -> None:
        """Take a finished picture [1, H, W, 3]."""
        ...

    def after_an_error(self) -> str:
        """Bring to safety what was added; says in words where it is."""
        ...


@dataclass(frozen=True)
class Report:
    """What a run did. groups: pictures per forward, in order. seconds: by pass. failed: name of a
    picture and why it is not there.
    """

    pictures: int
    there_before: int
    failed: dict[str, str]
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
        before = f", {self.there_before} more were there before" if self.there_before else ""
        lines = [
            f"{self.pictures} pictures on canvases of {canvases}{before}",
            *self._failures(),
            f"sampled in groups of {', '.join(map(str, self.groups))} (planned at most "
            f"{', '.join(map(str, self.planned))}; memory ran out {self.halvings} times)",
            f"encoded {self.persons_encoded} persons and {self.garments_encoded} garments",
            ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items()),
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _failures(self) -> list[str]:
        """One line per reason, with the pictures it concerns."""
        names: dict[str, list[str]] = {}
        for name, reason in self.failed.items():
            names.setdefault(reason, []).append(name)
        return [f"not made: {', '.join(them)}: {reason}" for reason, them in names.items()]


def single_pictures(batches: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Batches [B, ...] of any sizes -> [1, ...] each, in order; a mask [H, W] counts as one."""
    whole = [batch[None] if batch.ndim == 2 else batch for batch in batches if batch is not None]
    return [batch[i : i + 1] for batch in whole for i in range(len(batch))]


def listed(
    what: str,
    batches: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    called: str,
) -> list[Source]:
    """Pictures of a list, numbered from 1, each with its mask; one mask serves all, and no mask is
    for a garment that is not transparent.
    """
    found, beside = single_pictures(batches), single_pictures(masks)
    if len(beside) not in (1, len(found)) and (beside or what == "person"):
        raise FrugalError(
            f"there are {len(beside)} {called} for {len(found)} {what}s",
            "one each, or a single one for all",
            f"connect as many {called} as {what}s",
        )
    fitting = beside * len(found) if len(beside) == 1 else beside or [None] * len(found)
    pairs = enumerate(zip(found, fitting, strict=True), start=1)
    return [Source(f"{what}_{n}", lambda pair=pair: pair) for n, pair in pairs]


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


def settings_of(model, given: Mapping[str, Any]) -> Settings:
    """From the inputs that the batch nodes share, by name."""
    sampler, sigmas = schedule(
        model, given["steps"], given["eta"], given.get("sampler"), given.get("sigmas")
    )
    return Settings(
        cfg=given["cfg"],
        seed=given["seed"],
        sampler=sampler,
        sigmas=sigmas,
        fit=given["fit"],
        context=25,
        threshold=0.5,
        blur=given["mask_blur"],
        color_match=given.get("color_match", False),
        blend=given.get("blend", blending.INSIDE),
        budget=int(given["memory_budget"] * 2**30),
        largest=given["largest_group"],
    )


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
    """One run over `scenes`, whose persons and garments are numbers in the two lists.

    Nothing of a run outlives it, and the model is not changed. say: told how far the run is.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        persons: Sequence[Source],
        garments: Sequence[Source],
        scenes: Sequence[Scene],
        how: Settings,
        delivery: Delivery,
        say: Callable[[str], None] = lambda _: None,
    ):
        glue.require_masked_model(model)
        self.model, self.vae, self.how, self.scenes = model, vae, how, scenes
        self.persons, self.garments, self.delivery, self.say = persons, garments, delivery, say
        self.factor = glue.vae_factor(vae)
        for size in {scene.size for scene in scenes}:
            latents.check_size(size, self.factor)
        once = batching.OnceEach
        self.placed = once(self._place, 1)
        self.upper = once(lambda at: glue.encode_person(*self._canvas(at)[:2], vae), KEPT)
        self.lower = once(self._encode_garment, KEPT)
        self.outcome, self.planned, self.notes = batching.Outcome(), [], []
        self.failed: dict[int, str] = {}
        self.seconds = dict.fromkeys(("encode", "sample", "decode"), 0.0)
        self.todo = [n for n in range(len(scenes)) if not delivery.has(n)]
        self.rounds = max(1, len(how.sigmas) - 1)
        self.bar = comfy.utils.ProgressBar(max(1, len(self.todo)) * self.rounds)
        self.finished, self.started = 0, time.perf_counter()

    def run(self) -> Report:
        """Hand every picture that can be made to the delivery; see `Report.failed` for the rest.

        Raises FrugalError when none can be made, and when one picture alone does not fit into
        memory. On that and on any error but a cancel, what was finished is brought to safety first.
        """
        if not item_noise.can_batch(self.how.sampler) and len(self.todo) > 1:
            self.notes.append("this sampler draws its noise per batch, so pictures go one by one")
        try:
            for part in batching.rounds(len(self.todo), max(ROUND, self.how.largest)):
                self._round([self.todo[at] for at in part])
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            self._finish_others()
            kept = self.delivery.after_an_error()
            if isinstance(error, FrugalError):
                raise FrugalError(error.found, error.expected, f"{error.do}; {kept}") from error
            LOG.warning("[Frugal] the batch stopped at '%s'; %s.", error, kept)
            raise
        if self.failed and len(self.failed) == len(self.scenes):
            number, reason = next(iter(self.failed.items()))
            raise FrugalError(
                f"none of the {len(self.scenes)} pictures could be made, {self.name(number)} for "
                f"this reason: {reason}",
                "at least one usable picture with its mask",
                "look at that picture and its mask",
            )
        return Report(
            self.finished,
            len(self.scenes) - len(self.todo),
            {self.name(number): reason for number, reason in self.failed.items()},
            tuple(batching.buckets([scene.size for scene in self.scenes])),
            tuple(self.outcome.groups),
            tuple(self.planned),
            self.outcome.halvings,
            self.upper.made,
            self.lower.made,
            self.seconds,
            tuple(dict.fromkeys(self.notes)),
        )

    def name(self, number: int) -> str:
        """Of a picture: its person's and its garment's."""
        scene = self.scenes[number]
        return f"{self.persons[scene.person].name}__{self.garments[scene.garment].name}"

    def _round(self, numbers: list[int]) -> None:
        times = [time.perf_counter()]
        usable = [number for number in numbers if self._tried(number, self._latents) is not None]
        times.append(time.perf_counter())
        self._sample(usable)
        times.append(time.perf_counter())
        for number in usable:
            self._deliver(number)
        times.append(time.perf_counter())
        for name, before, after in zip(self.seconds, times, times[1:], strict=False):
            self.seconds[name] += after - before

    def _tried(self, number: int, make: Callable[[int], Any]) -> Any:
        """make(number); None, and a line in the report, where the picture cannot be made."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            return make(number)
        except FrugalError as error:
            self.failed[number] = str(error)
            LOG.warning("[Frugal] Try-On Batch leaves out %s: %s", self.name(number), error)
            return None

    def _deliver(self, number: int) -> None:
        picture = self._tried(number, self._finish)
        del self.outcome.results[number]
        if picture is None:
            return
        self.delivery.add(number, picture)
        self.finished += 1
        each = (time.perf_counter() - self.started) / self.finished
        left = len(self.todo) - self.finished - len(self.failed)
        done = f"{self.finished} of {len(self.todo)} pictures, {each:.1f} s each"
        self.say(f"{done}, {_left(each * left)}")

    def _finish_others(self) -> None:
        """Finish and hand over what was sampled already, after an error."""
        for number in list(self.outcome.results):
            try:
                self._deliver(number)
            except (RuntimeError, MemoryError, OSError) as error:
                LOG.warning("[Frugal] picture %d is lost: %s", number + 1, error)

    def _place(self, person: int, size: tuple[int, int]):
        source, how = self.persons[person], self.how
        photo, mask = source.load()
        if mask is None:
            raise FrugalError(f"{source.name} has no mask", "a mask per person", "add its mask")
        shown, masks, frame = canvas.place_person(
            photo, mask, size, how.fit, how.context, how.threshold
        )
        self.notes += [f"{source.name}: {note}" for note in checks.mask_notes(mask, frame)]
        return shown, masks, frame

    def _canvas(self, scene: Scene):
        return self.placed((scene.person, scene.size), scene.person, scene.size)

    def _encode_garment(self, number: int, size: tuple[int, int]) -> torch.Tensor:
        source = self.garments[number]
        garment = pictures.on_white(*source.load(), "garment")
        self.notes += [f"{source.name}: {note}" for note in checks.garment_notes(garment)]
        return glue.encode(self.vae, canvas.on_white(garment, size))

    def _latents(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(person, garment, mask) at latent size, [1, ...] each."""
        scene = self.scenes[number]
        garment = self.lower((scene.garment, scene.size), scene.garment, scene.size)
        upper, small = self.upper((scene.person, scene.size), scene)
        return upper, garment, small

    def _sample(self, usable: list[int]) -> None:
        batched = item_noise.can_batch(self.how.sampler)
        by_size = batching.buckets([self.scenes[number].size for number in usable])
        for size, places in by_size.items():
            numbers = [usable[place] for place in places]
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
        parts = zip(*(self._latents(number) for number in numbers), strict=True)
        positive, negative, start = glue.assemble(*(torch.cat(part) for part in parts))
        seeds = [item_noise.seed_of(how.seed, number) for number in numbers]
        sampler = how.sampler if len(seeds) == 1 else item_noise.per_item(how.sampler, seeds)
        before = sum(self.outcome.groups) * self.rounds
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
        scene, how = self.scenes[number], self.how
        painted = glue.decode({"samples": self.outcome.results[number]}, self.vae, scene.size)
        return canvas.stitch(painted, self._canvas(scene)[2], how.blur, how.color_match, how.blend)

    def _refuse(self, size: tuple[int, int], free: int) -> None:
        need = bytes_per_picture(self.model, size, self.factor, self.how.cfg > 1)
        raise FrugalError(
            f"memory ran out on picture {self.outcome.failed + 1} alone, on a canvas of "
            f"{size[1]} x {size[0]} px",
            f"about {need / 2**30:.1f} GiB besides the weights ({free / 2**30:.1f} GiB were free)",
            "choose a smaller canvas, a smaller weight_dtype, or start ComfyUI with --lowvram",
        )


def _left(seconds: float) -> str:
    """What is left, in words."""
    if seconds < 1:
        return "done"
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
