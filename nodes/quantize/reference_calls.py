"""Keeps a few calls of the model while it samples, small enough to be made again by the quality
check: early, in the middle and late in a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...kernels.quantize.reference_calls import ReferenceCall, unstorable
from .cropped_calls import CLASSES, cut, named, options_of, run

# Of several runs that are added up, the first calls are kept.
MOST_CALLS = 12


class Keeper:
    """Takes the calls of one run. model: what runs, JSON. `why_not`: why none is kept, or ""."""

    def __init__(self, model: Mapping[str, Any], diffusion_model: torch.nn.Module):
        self.model = model
        self.calls: list[ReferenceCall] = []
        self.why_not = ""
        self._left: list[float] | None = None
        kind = type(diffusion_model).__name__
        if kind not in CLASSES:
            self.why_not = f"a {kind} is not one of {', '.join(CLASSES)}"

    def due(self, options: Mapping[str, Any]) -> bool:
        """Whether the call with these transformer_options is the first of its part of the run."""
        if self.why_not:
            return False
        now, steps = options.get("sigmas"), options.get("sample_sigmas")
        if now is None or steps is None or len(steps) < 2:
            return not self.calls
        sigma = float(now.max())
        if self._left is None:
            self._left = _points([float(step) for step in steps])
        passed = [point for point in self._left if sigma <= point * (1 + 1e-4)]
        self._left = [point for point in self._left if point not in passed]
        return bool(passed)

    @torch.no_grad()
    def take(self, executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Cut this call, run the model on it, and keep both, or say why not."""
        small, more = cut(args, kwargs)
        arguments = named(executor, small, more)
        found = unstorable(arguments)
        if found is not None:
            self.why_not = f"the input {found} cannot be kept"
            return
        now = options_of(args, kwargs).get("sigmas")
        self.calls.append(
            ReferenceCall(
                {name: _on_cpu(value) for name, value in arguments.items()},
                run(executor, small, more).detach().cpu(),
                None if now is None else float(now.max()),
                self.model,
            )
        )


def joined(earlier: Sequence[ReferenceCall], now: Sequence[ReferenceCall]) -> list[ReferenceCall]:
    """The calls of all runs that a file keeps."""
    return [*earlier, *now][:MOST_CALLS]


def _points(steps: list[float]) -> list[float]:
    """Noise levels at which the first, the middle and the last step of a run begin."""
    last = len(steps) - 2
    return sorted({steps[0], steps[last // 2], steps[last]}, reverse=True)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_cpu(each) for each in value]
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
