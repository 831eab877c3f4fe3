"""A planned MODEL at work: what ComfyUI is told about its memory, and what happens if it runs out.

Both last for one run. ComfyUI asks a model for its memory when it makes room for a run and when it
decides how many conditions share a forward; while a planned run lasts it gets the traced numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.memory.plan import MemoryOptions, notches
from ...kernels.report import megabytes
from ...kernels.retry import NothingLeftError, retry
from .._comfy import PLAN_KEY
from .._memory import is_out_of_memory
from . import dynamic_vram, run_report_run
from .chunked_blocks import ActiveOptions
from .meta_models import ForwardPeaks

KEY = PLAN_KEY
# Least share of the weights that leaves the device when nothing else is left to do.
SHARE = 0.1
Shape = list[int] | tuple[int, ...]


@dataclass
class Policy:
    """budget: bytes for everything, None for all that is free. say: gets what was done. changes:
    the same, of the latest run. buffers: bytes for weights on their way to the device.
    """

    state: ActiveOptions
    peaks: ForwardPeaks
    budget: int | None
    say: Callable[[str], None]
    changes: list[str] = field(default_factory=list)
    buffers: int = 0
    # Of the run that lasts, [B, C, T, H, W].
    shape: tuple[int, ...] | None = field(default=None, init=False)

    def attach(self, patcher: Any) -> None:
        """Follow the runs of this ModelPatcher, in place of a plan that it may have."""
        kinds = comfy.patcher_extension.WrappersMP
        for kind, wrapper in (
            (kinds.OUTER_SAMPLE, self.run),
            (kinds.CALC_COND_BATCH, self.forward),
        ):
            patcher.remove_wrappers_with_key(kind, KEY)
            patcher.add_wrapper_with_key(kind, KEY, wrapper)
        loaded = comfy.patcher_extension.CallbacksMP.ON_LOAD
        patcher.remove_callbacks_with_key(loaded, KEY)
        patcher.add_callback_with_key(loaded, KEY, self.on_load)

    def run(self, executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling run."""
        patcher = executor.class_obj.model_patcher
        batch = noise.shape[0]

        # The names are those of ComfyUI's own method, which is called by them too.
        def to_load(input_shape: Shape, cond_shapes: Any = None) -> float:
            # ComfyUI asks for two conditions at once and for one.
            rows = min(input_shape[0], batch) if self.state.now.sequential else input_shape[0]
            return self.needed(rows, batch, input_shape) + self.withheld(patcher)

        self.state.now = self.state.planned
        self.changes.clear()
        options = executor.class_obj.model_options.get("transformer_options", {})
        self.peaks.begin(tuple(noise.shape), options)
        self.shape = tuple(noise.shape) if noise.ndim == 5 else None
        try:
            with answering(patcher.model, noise.shape, to_load):
                return executor(noise, *args, **kwargs)
        finally:
            self.state.now, self.shape = self.state.planned, None

    def on_load(self, patcher: Any, *_: Any) -> None:
        """ComfyUI made the weights ready for a run: keep them within the budget where it would not
        do so by itself.
        """
        if self.budget is None or self.shape is None or not dynamic_vram.is_dynamic(patcher):
            return
        rows = self.shape[0] * (1 if self.state.now.sequential else 2)
        room = self.budget - self.needed(rows, self.shape[0], self.shape)
        dynamic_vram.share(patcher, room, self.buffers)

    def needed(self, rows: int, batch: int, shape: Shape) -> int:
        """Bytes of a run of `batch` latents on top of the weights, `rows` of them in a forward."""
        return self.peak(rows, shape) + self.peaks.beside(batch, tuple(shape[2:]))

    def forward(
        self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any
    ) -> Any:
        """Around the forwards of one model call, repeated with less memory if it runs out."""

        def at_once(input_shape: Shape, cond_shapes: Any = None) -> float:
            if self.state.now.sequential and input_shape[0] > x.shape[0]:
                return math.inf
            return self.peak(input_shape[0], input_shape)

        remedies = self.remedies(model.current_patcher, x.shape)
        with answering(model, x.shape, at_once):
            try:
                return retry(
                    lambda: executor(model, conds, x, timestep, options), is_out_of_memory, remedies
                )
            except NothingLeftError:
                raise self.refusal(x.shape) from None
            finally:
                run_report_run.METER.look(x.device)

    def peak(self, rows: int, shape: Shape) -> int:
        return self.peaks.of(rows, tuple(shape[2:]), self.state.now)

    def withheld(self, patcher: Any) -> int:
        """Bytes of the device that lie beyond the budget. Models on it that this run does not use,
        such as the other one of two experts, have to make room first.
        """
        device = patcher.load_device
        if self.budget is None or device.type == "cpu":
            return 0
        return max(0, run_report_run.obtainable(device) - self.budget)

    def room_made(self, shape: Shape) -> int:
        """What is alive at the peak as the run goes now; the allocator gives back what it holds of
        the call that failed, since the next one wants it in pieces of another size.
        """
        comfy.model_management.soft_empty_cache()
        return self.alive(self.state.now, shape)

    def remedies(self, patcher: Any, shape: Shape) -> Iterator[None]:
        """What can be given up for a model call that ran out of memory: one notch after another for
        the rest of the run, and in the end some of the weights, once.
        """
        while True:
            was = self.room_made(shape)
            notch = next((n for n in notches(self.state.now) if self.alive(n, shape) < was), None)
            if notch is None:
                break
            self.state.now = notch
            self.tell(f"continues with: {notch.text()}")
            yield
        # All that the forward lacks at once: what is not enough now would not be the next time, and
        # where weights come back with their layers, there would be no end to it.
        freed = release_weights(patcher, was)
        if freed:
            self.tell(f"continues with {megabytes(freed)} of weights in main memory")
            yield

    def alive(self, memory_options: MemoryOptions, shape: Shape) -> int:
        """Bytes of a forward under these options, of both conditions unless they are apart."""
        rows = shape[0] * (1 if memory_options.sequential else 2)
        return self.peaks.of(rows, tuple(shape[2:]), memory_options)

    def refusal(self, shape: Shape) -> Exception:
        """ComfyUI's out-of-memory error, which makes it put all models away."""
        size = megabytes(self.alive(self.state.now, shape))
        error = FrugalError(
            f"the device has no room for a forward pass of {size}, with every memory option on",
            "that much free",
            "choose a smaller size or fewer frames, or close other programs that use the device",
        )
        return comfy.model_management.OOM_EXCEPTION(str(error))

    def tell(self, what: str) -> None:
        line = f"out of memory: retrying this step, the run {what}"
        LOG.warning("[Frugal] %s", line)
        self.changes.append(line)
        self.say(line)


@contextmanager
def answering(model: Any, shape: Shape, answer: Callable[..., float]) -> Iterator[None]:
    """While it lasts, `model` answers ComfyUI's question for memory with `answer`, unless its
    latents are no video.
    """
    if len(shape) != 5:
        yield
        return
    name = "memory_required"
    before = vars(model).get(name)
    vars(model)[name] = answer
    try:
        yield
    finally:
        if before is None:
            del vars(model)[name]
        else:
            vars(model)[name] = before


def release_weights(patcher: Any, needed: int) -> int:
    """Move weights off the device, as many bytes as a forward of `needed` bytes lacks, a tenth of
    them at least; bytes that became free.
    """
    if patcher is None or patcher.load_device.type == "cpu" or not patcher.loaded_size():
        return 0
    lacking = needed - comfy.model_management.get_free_memory(patcher.load_device)
    amount = max(int(lacking), int(patcher.model_size() * SHARE))
    freed = dynamic_vram.release(patcher, amount)
    comfy.model_management.soft_empty_cache()
    return freed
