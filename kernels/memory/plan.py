"""Memory of a video run, phase by phase, before it starts, and which memory options make it fit.

All numbers are bytes. A phase is one stage of the run (text, sampling, decoding) and is a stack of
parts that are on the device at the same time: weights, what a forward has alive, latents. ComfyUI
moves the models of other phases out when it needs room, so each phase counts for itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..report import megabytes
from .main_memory import MainMemory

TEXT, SAMPLE, DECODE = "text encoding", "sampling, each step", "decoding"
WEIGHTS, STREAMED, WORK, LATENTS = "weights", "buffers of streamed weights", "forward", "latents"
EXPANDED, CROSS_KV, CAUSAL_KV = "dequantized layer", "cross-attention K and V", "causal K and V"
# fp32 tensors of the latent's shape that ComfyUI and a sampler hold around a forward: noise, start,
# x, denoised, and per condition output, count and weight; counted on a run (docs/memory.md).
LATENT_COPIES = 12
# Weights on their way: ComfyUI copies the next layer while it computes with the last one.
BUFFERS = 2


@dataclass(frozen=True)
class MemoryOptions:
    """sequential: the conditional and the unconditional forward one after the other. pieces: the
    feed-forward and the cross-attention by so many pieces of the tokens. attention: queries, keys
    and values of the self-attention by so many pieces, its heads by so many groups.
    """

    sequential: bool = False
    pieces: int = 1
    attention: int = 1

    def text(self) -> str:
        said = []
        if self.sequential:
            said.append("cond and uncond run sequentially")
        if self.pieces > 1:
            said.append(f"feed-forward and cross-attention in {self.pieces} chunks")
        if self.attention > 1:
            said.append(f"self-attention in {self.attention} chunks and groups of heads")
        return ", ".join(said) or "none"


# Pieces more than these make matrix products too small to keep a card busy.
MOST_PIECES = 8


def notches(now: MemoryOptions, guided: bool = True) -> list[MemoryOptions]:
    """One notch smaller than `now`, every way that is left, the least cost in time first."""
    found = []
    if guided and not now.sequential:
        found.append(replace(now, sequential=True))
    if now.pieces < MOST_PIECES:
        found.append(replace(now, pieces=2 * now.pieces))
    if now.attention < MOST_PIECES:
        found.append(replace(now, attention=2 * now.attention))
    if max(now.pieces, now.attention) < MOST_PIECES:
        found.append(replace(now, pieces=2 * now.pieces, attention=2 * now.attention))
    return found


def latent_bytes(batch: int, latent: tuple[int, ...]) -> int:
    """Bytes of the fp32 latents [batch, 16, T, H, W] around a forward."""
    return LATENT_COPIES * 4 * 16 * batch * math.prod(latent)


@dataclass(frozen=True)
class Job:
    """width and height in px, frames of video, batch: videos at once; guided: two forwards a
    step. block: latent frames that a causal model makes at a time, 0 for all.
    """

    width: int
    height: int
    frames: int
    batch: int = 1
    guided: bool = True
    block: int = 0

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width (Wan: a quarter of the frames, an eighth of the size)."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * -(-height // 2) * -(-width // 2)

    def text(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        guided = "guided" if self.guided else "not guided"
        blocks = f" in blocks of {self.block} latent frames" if self.block else ""
        return (
            f"{self.width} x {self.height}, {self.frames} frames{batch}, {guided}: "
            f"{self.tokens:,} tokens{blocks}"
        )


@dataclass(frozen=True)
class Weights:
    """total as the MODEL holds them, formats: name -> bytes, largest: the largest layer as it is
    multiplied with, expanded: a layer that is expanded to the compute type before that (0: none),
    w4a8: the same model with its layers in W4A8 (None: not known). caches: name -> bytes of what is
    kept between the steps.
    """

    total: int
    formats: dict[str, int]
    largest: int
    expanded: int = 0
    w4a8: int | None = None
    caches: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """Bytes of the VAE's weights and of what a decode has alive: whole, in a stream, in tiles."""

    weights: int
    whole: int
    stream: int
    tiled: int
    how: str = "traced"


@dataclass(frozen=True)
class Phase:
    """One phase of a run: its name, and bytes by what takes them."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def text(self) -> str:
        parts = ", ".join(f"{name} {megabytes(size)}" for name, size in self.parts.items() if size)
        return f"{self.name}: {megabytes(self.total)} ({parts})"


@dataclass(frozen=True)
class MemoryPlan:
    """budget: what may be used. before: the phases as ComfyUI would run them, everything on the
    device. phases: with the plan. streamed: weights streamed from main memory in every step. fits:
    no phase is larger than the budget. peaks: memory options tried -> bytes of the forward, in
    order. advice: what else would help, cheapest first. main_memory: what the weights take
    there, where it is known.
    """

    title: str
    job: Job
    budget: int
    budget_from: str
    before: tuple[Phase, ...]
    phases: tuple[Phase, ...]
    memory_options: MemoryOptions
    peaks: tuple[tuple[MemoryOptions, int], ...]
    formats: dict[str, int]
    streamed: int = 0
    fits: bool = True
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    main_memory: MainMemory | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        return asdict(self) | {
            "totals": {phase.name: phase.total for phase in self.phases},
            "tokens": self.job.tokens,
        }

    def json(self) -> str:
        return json.dumps(self.to_dict())

    def verdict(self) -> str:
        """Whether it fits, in one line."""
        largest = max(phase.total for phase in self.phases)
        fits = "fits" if self.fits else "does NOT fit"
        return f"{fits}: {megabytes(largest)} of {megabytes(self.budget)} ({self.budget_from})"

    def text(self) -> str:
        """The same as lines of text."""
        held = ", ".join(f"{name} {megabytes(size)}" for name, size in self.formats.items())
        lines = [
            self.verdict(),
            f"{self.title}, {self.job.text()}",
            f"memory options: {self.memory_options.text()}",
        ]
        if self.streamed:
            lines.append(
                f"weights streamed from main memory in every step: {megabytes(self.streamed)}"
            )
        lines += [f"weights: {held}", *(phase.text() for phase in self.phases)]
        if self.main_memory is not None:
            lines += self.main_memory.lines()
        if self.before != self.phases:
            lines += ["without the plan:", *(phase.text() for phase in self.before)]
        lines += [f"advice: {line}" for line in self.advice]
        return "\n".join([*lines, *(f"note: {line}" for line in self.notes)])


def make_plan(
    title: str,
    job: Job,
    weights: Weights,
    peak: Callable[[MemoryOptions], int],
    budget: int,
    budget_from: str,
    encoder: Phase | None = None,
    decoding: Decoding | None = None,
    notes: Iterable[str] = (),
    latents: int | None = None,
) -> MemoryPlan:
    """Find the memory options that cost the least time with which the run fits into `budget`; one
    that lowers nothing is left out.

    peak: bytes alive in a forward under these options, both conditions counted unless sequential.
    latents: bytes of latents around a forward, if not those of an ordinary sampler.
    """
    beside = {
        LATENTS: latent_bytes(job.batch, job.latent) if latents is None else latents,
        EXPANDED: weights.expanded,
        **weights.caches,
    }
    around = sum(beside.values())
    chosen, least = MemoryOptions(), peak(MemoryOptions())
    tried = [(chosen, least)]
    while weights.total + around + least > budget:
        for notch in notches(chosen, job.guided):
            size = peak(notch)
            tried.append((notch, size))
            if size < least:
                chosen, least = notch, size
                break
        else:
            break

    before = _sampling(weights, 0, tried[0][1], beside)
    missing = weights.total + around + least - budget
    streamed = 0
    if missing > 0:
        streamed = min(weights.total, missing + BUFFERS * weights.largest)
    sampling = _sampling(weights, streamed, least, beside)
    first, planned = [before], [sampling]
    advice = []
    if sampling.total > budget:
        advice.append(
            "the forward pass alone does not fit: choose a smaller size or fewer frames (the "
            f"tokens of {job.text()} need {megabytes(least + around)} without any weights)"
        )
    elif streamed and weights.w4a8 is not None and weights.w4a8 < weights.total:
        left = max(0, weights.w4a8 + around + least - budget)
        then = f"{megabytes(left)} would still be streamed" if left else "nothing would be streamed"
        advice.append(f"a W4A8 file of this model takes {megabytes(weights.w4a8)}: {then}")
    if encoder is not None:
        first.insert(0, encoder)
        planned.insert(0, encoder)
        if encoder.total > budget:
            advice.append(
                "the text encoder does not fit and is streamed by ComfyUI: an fp8 file, or saved "
                "text embeddings (Save Text Embeddings), need less"
            )
    if decoding is not None:
        first.append(_decoding(decoding, decoding.whole))
        phase, said = _fitting_decode(decoding, budget)
        planned.append(phase)
        advice += said
    # A text encoder may be larger than the budget: ComfyUI then keeps a part of it in main memory.
    needed = [phase.total for phase in planned if phase.name != TEXT]
    return MemoryPlan(
        title,
        job,
        budget,
        budget_from,
        tuple(first),
        tuple(planned),
        chosen,
        tuple(tried),
        weights.formats,
        streamed,
        max(needed) <= budget,
        tuple(advice),
        tuple(notes),
    )


def _sampling(weights: Weights, streamed: int, peak: int, beside: dict[str, int]) -> Phase:
    buffers = BUFFERS * weights.largest if streamed else 0
    held = {WEIGHTS: weights.total - streamed, STREAMED: buffers, WORK: peak, **beside}
    return Phase(SAMPLE, held)


def _decoding(found: Decoding, work: int) -> Phase:
    return Phase(DECODE, {WEIGHTS: found.weights, WORK: work})


def _fitting_decode(found: Decoding, budget: int) -> tuple[Phase, list[str]]:
    ways = (
        (found.whole, None),
        (found.stream, "decode in chunks (Decode Wan Video): the same frames"),
        (found.tiled, "decode in tiles (VAE Decode (Tiled), 256 px): seams may show"),
    )
    work, how = next((way for way in ways if found.weights + way[0] <= budget), ways[-1])
    said = [] if how is None else [f"{how}, {megabytes(found.weights + work)} ({found.how})"]
    return _decoding(found, work), said
