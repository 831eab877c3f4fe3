"""A planned MODEL at work: what ComfyUI is told about its memory, and what happens if it runs out.

Both last for one run. ComfyUI asks a model for its memory when it makes room for a run and when it
decides how many conditions share a forward; while a planned run lasts it gets the traced numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension

from ...kernels.errors import FrugalError
from ...kernels.plan.memory import notches
from ...kernels.report import megabytes
from .._comfy import PLAN_KEY
from . import glue
from .chunking import InForce
from .meta import ForwardPeaks

KEY = PLAN_KEY
# Share of the weights that leave the device at once when nothing else is left to do.
SHARE = 0.1
Shape = list[int] | tuple[int, ...]


@dataclass
class Policy:
    """budget: bytes for everything, None for all that is free. say: gets what was done. changes:
    the same, of the latest run.
    """

    state: InForce
    peaks: ForwardPeaks
    budget: int | None
    say: Callable[[str], None]
    changes: list[str] = field(default_factory=list)

    def attach(self, patcher: Any) -> None:
        """Follow the runs of this ModelPatcher, in place of a plan that it may have."""
        kinds = comfy.patcher_extension.WrappersMP
        for kind, wrapper in (
            (kinds.OUTER_SAMPLE, self.run),
            (kinds.CALC_COND_BATCH, self.forward),
        ):
            patcher.remove_wrappers_with_key(kind, KEY)
            patcher.add_wrapper_with_key(kind, KEY, wrapper)

    def run(self, executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling run."""
        patcher = executor.class_obj.model_patcher
        batch = noise.shape[0]

        # The names are those of ComfyUI's own method, which is called by them too.
        def to_load(input_shape: Shape, cond_shapes: Any = None) -> float:
            # ComfyUI asks for two conditions at once and for one.
            rows = min(input_shape[0], batch) if self.state.now.sequential else input_shape[0]
            needed = self.peak(rows, input_shape) + self.peaks.beside(batch, tuple(noise.shape[2:]))
            return needed + self.withheld(patcher)

        self.state.now = self.state.planned
        self.changes.clear()
        options = executor.class_obj.model_options.get("transformer_options", {})
        self.peaks.begin(tuple(noise.shape), options)
        try:
            with answering(patcher.model, noise.shape, to_load):
                return executor(noise, *args, **kwargs)
        finally:
            self.state.now = self.state.planned

    def forward(
        self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any
    ) -> Any:
        """Around the forwards of one model call, repeated with less memory if it runs out."""

        def at_once(input_shape: Shape, cond_shapes: Any = None) -> float:
            if self.state.now.sequential and input_shape[0] > x.shape[0]:
                return math.inf
            return self.peak(input_shape[0], input_shape)

        with answering(model, x.shape, at_once):
            while True:
                try:
                    return executor(model, conds, x, timestep, options)
                except out_of_memory_errors() as error:
                    if not is_out_of_memory(error):
                        raise
                # Only here are the frames gone that held what the forward had made.
                self.make_room(model.current_patcher, x.shape)

    def peak(self, rows: int, shape: Shape) -> int:
        return self.peaks.of(rows, tuple(shape[2:]), self.state.now)

    def withheld(self, patcher: Any) -> int:
        """Bytes of the device that lie beyond the budget. Models on it that this run does not use,
        such as the other one of two experts, have to make room first.
        """
        device = patcher.load_device
        if self.budget is None or device.type == "cpu":
            return 0
        return max(0, glue.obtainable(device) - self.budget)

    def make_room(self, patcher: Any, shape: Shape) -> None:
        """One notch less memory from now on. Raises ComfyUI's out-of-memory error at the end."""
        comfy.model_management.soft_empty_cache()
        before = self.state.now
        was = self.peak(shape[0] * (1 if before.sequential else 2), shape)
        for notch in notches(before):
            rows = shape[0] * (1 if notch.sequential else 2)
            if self.peaks.of(rows, tuple(shape[2:]), notch) < was:
                self.state.now = notch
                self.tell(f"goes on with: {notch.text()}")
                return
        freed = release_weights(patcher)
        if freed:
            self.tell(f"goes on with {megabytes(freed)} of weights in main memory")
            return
        error = FrugalError(
            f"the device has no room for a forward of {megabytes(was)}, with every switch on",
            "that much free",
            "choose a smaller size or fewer frames, or close other programs that use the device",
        )
        raise comfy.model_management.OOM_EXCEPTION(str(error))

    def tell(self, what: str) -> None:
        line = f"out of memory: this step is repeated and the run {what}"
        logging.warning("[Frugal] %s", line)
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


def out_of_memory_errors() -> tuple[type[BaseException], ...]:
    """Types that may mean that the device has no memory left."""
    management = comfy.model_management
    named = (management.OOM_EXCEPTION, getattr(management, "ACCELERATOR_ERROR", None))
    # ComfyUI puts Exception where torch has no type for it.
    return tuple(kind for kind in named if kind is not None and kind is not Exception)


def is_out_of_memory(error: BaseException) -> bool:
    """ComfyUI's own answer, where it has one."""
    ask = getattr(comfy.model_management, "is_oom", None)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION) if ask is None else ask(error)


def release_weights(patcher: Any) -> int:
    """Move a tenth of the weights off the device; bytes that became free."""
    if patcher is None or patcher.load_device.type == "cpu" or not patcher.loaded_size():
        return 0
    amount = int(patcher.model_size() * SHARE)
    freed = patcher.partially_unload(patcher.offload_device, amount)
    comfy.model_management.soft_empty_cache()
    return int(freed or 0)
