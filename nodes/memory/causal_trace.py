"""Forwards of a causal Wan without memory: one block, and the frames in the window in pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...kernels.causal.cache import VideoCache
from ...kernels.causal.options import CacheOptions
from ...kernels.causal.storage import wan_page
from ...kernels.causal.strategies import CHUNKED, cuda_kernel, over_pages
from ...kernels.memory.causal import CausalMemory, Needs, remedies
from ...kernels.memory.plan import CAUSAL_KV, SAMPLE, STREAMED, WORK, Job, MemoryOptions, MemoryPlan
from ...kernels.report import megabytes
from .._comfy import ATTENTION_OVERRIDE, CAUSAL_KEY, CAUSAL_NEEDS_KEY
from .meta_models import ForwardPeaks


def options_of(model: Any) -> CacheOptions | None:
    """Of a MODEL that Causal Model made causal; None for any other."""
    return model.model_options.get("transformer_options", {}).get(CAUSAL_KEY)


def peaks_of(model: Any, device: torch.device, options: CacheOptions, job: Job) -> CausalPeaks:
    """Of a job of the causal `model` (of a MODEL) that starts without a session."""
    frames = job.latent[0]
    needs = Needs(min(job.block, frames), 0, 2 if job.guided else 1)
    return CausalPeaks(model, device, options, needs, frames)


class CausalPeaks(ForwardPeaks):
    """Peaks of the forwards on one block while the cache is as full as it gets.

    needs, frames: of the run to come, latent frames.
    """

    def __init__(
        self, model: Any, device: torch.device, options: CacheOptions, needs: Needs, frames: int
    ):
        super().__init__(model, device, causal=True)
        self.options, self.needs, self.frames = options, needs, frames
        network = model.diffusion_model
        self._heads, self._width = network.num_heads, network.dim
        self._device = device

    def notes(self, job: Job) -> list[str]:
        """What the run will keep, and what is not counted of it."""
        said = self.memory(job.batch, job.latent).notes()
        fused = self._device.type == "cpu" or (
            self._device.type == "cuda" and cuda_kernel(self._dtype, self._device)
        )
        if self.options.way == CHUNKED and not fused:
            said.append(
                f"chunked attention makes scores in {self._dtype} on {self._device.type}, which "
                "are not counted: set attention to 'gathered'"
            )
        return said

    def with_options(self, options: CacheOptions) -> CausalPeaks:
        """The same model and run with another cache."""
        other = object.__new__(CausalPeaks)
        other.__dict__ = {**self.__dict__, "options": options, "_known": {}}
        return other

    def begin(self, shape: tuple[int, ...], transformer_options: dict[str, Any]) -> None:
        needs = transformer_options.get(CAUSAL_NEEDS_KEY)
        self.needs = needs or replace(self.needs, block=min(self.needs.block, shape[2]))
        self.frames, self._known = shape[2], {}

    def memory(self, batch: int, latent: tuple[int, ...]) -> CausalMemory:
        """Of `batch` videos at a size T, h, w; T is that of the run."""
        page = wan_page(
            (batch, 0, 1, *latent[1:]), self._heads, self._width, self._dtype, self.options.kind
        )
        return CausalMemory(self.options, page, self._layers, self.needs, self.frames)

    def beside(self, batch: int, latent: tuple[int, ...]) -> int:
        memory = self.memory(batch, latent)
        return memory.latents(*latent[1:]) + memory.pages

    def of(self, batch: int, latent: tuple[int, ...], memory_options: MemoryOptions) -> int:
        # The heads of a block share one reading of the pages, so they stay together.
        block = min(self.needs.block, self.frames), *latent[1:]
        return super().of(batch, block, replace(memory_options, attention=1))

    def advice(self, plan: MemoryPlan) -> list[str]:
        """Settings of the causal model with which nothing would be streamed and all would fit; none
        where that is so.
        """
        job, memory = plan.job, self.memory(plan.job.batch, plan.job.latent)
        said = []
        if 0 < self.options.budget < memory.pages:
            said.append(
                f"the causal model's max_cache_gb is {megabytes(self.options.budget)} and its "
                f"cache is {megabytes(memory.pages)}: the run will be refused; raise it or set it "
                "to 0"
            )
        (phase,) = (phase for phase in plan.phases if phase.name == SAMPLE)
        if not plan.streamed and phase.total <= plan.budget:
            return said
        others = (STREAMED, WORK, CAUSAL_KV)
        # What is on the device in any case, once no weight is streamed.
        fixed = plan.streamed + sum(
            size for name, size in phase.parts.items() if name not in others
        )
        room = plan.budget - fixed

        def needed(options: CacheOptions) -> int:
            other = self.with_options(options)
            pages = other.memory(job.batch, job.latent).pages
            return pages + other.of_job(job, plan.memory_options)

        return said + remedies(self.options, self.needs.block, needed, room)

    def prepare(self, model: Any, batch: int, latent: tuple[int, ...]) -> None:
        sides = 2 if batch % 2 == 0 and self.needs.sides == 2 else 1
        cache = self.memory(batch // sides, latent).filled(len(model.blocks), sides)
        for layer, block in enumerate(model.blocks):
            inner = block.self_attn.forward
            block.self_attn.forward = _block_forward(inner, cache, layer, sides)


def _block_forward(
    inner: Callable[..., torch.Tensor], cache: VideoCache, layer: int, sides: int
) -> Callable[..., torch.Tensor]:
    def attend(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **__: Any):
        return over_pages(
            cache, layer, range(sides), q, k, v, heads, lambda q, *_: torch.empty_like(q)
        )

    def forward(x: torch.Tensor, *args: Any, transformer_options: Any = None, **kwargs: Any):
        options = {**(transformer_options or {}), ATTENTION_OVERRIDE: attend}
        return inner(x, *args, transformer_options=options, **kwargs)

    return forward
