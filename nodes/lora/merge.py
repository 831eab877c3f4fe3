"""LoRAs merged into weights before they are quantised, by ComfyUI's own readers and formulas."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.lora
import torch

from ...kernels.errors import FrugalError
from ...kernels.lora.low_rank import dora_gain
from ...kernels.quantize.weights import Weights
from .apply import NotBesideError, delta_of
from .file import PREFIX, LoraFile, read_for

LISTED = 6


class LoraMerge:
    """A Merge of the converter: all changes that LoRA files make to a Wan model's tensors."""

    def __init__(self, weights: Weights, loras: Sequence[tuple[Path, float]]):
        table = weights.plan.table
        places = {PREFIX + name.removesuffix(".weight"): name for name in table}
        self._patches: dict[str, list[tuple[float, Any]]] = {}
        notes, titles, marks = [], [], []
        for path, strength in loras:
            file = read_for(path, places)
            left = self._take(file, strength, set(table))
            notes.append(_told(file, strength, left))
            titles.append(f"{path.name} at {strength:g}")
            state = path.stat()
            marks.append(f"{titles[-1]}, {state.st_size}, {state.st_mtime_ns}")
        self.notes, self.title, self.identity = tuple(notes), "; ".join(titles), "; ".join(marks)
        self.names = frozenset(self._patches)

    def _take(self, file: LoraFile, strength: float, names: set[str]) -> dict[str, str]:
        left, taken = dict(file.unplaced), 0
        for entry in file.entries:
            if entry.name not in names:
                left |= dict.fromkeys(entry.keys, f"the model has no {entry.name}")
                continue
            self._patches.setdefault(entry.name, []).append((strength, entry.patch))
            taken += 1
        if not taken:
            key = next(iter(left), "no key")
            raise FrugalError(
                f"{file.name} has {file.count} keys and none that fits "
                f"(first {ascii(key)[1:-1][:80]})",
                "a LoRA for this Wan model",
                "choose a LoRA that was trained on it",
            )
        return left

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The float32 tensor with all changes; raises FrugalError where ComfyUI cannot make one."""
        for strength, patch in self._patches[name]:
            exact = _with_magnitude(weight, patch, strength)
            if exact is not None:
                weight = exact
                continue
            patches = [(strength, patch, 1.0, None, None)]
            with _complaints() as found:
                weight = comfy.lora.calculate_weight(patches, weight, name, torch.float32)
            if found:
                raise FrugalError(
                    f"ComfyUI could not merge a LoRA into {name} ({ascii(found[0])[1:-1][:120]})",
                    "a LoRA of the model's shapes",
                    "choose a LoRA that was trained on this model",
                )
        return weight


def _with_magnitude(weight: torch.Tensor, patch: Any, strength: float) -> torch.Tensor | None:
    """The weight with a DoRA whose magnitudes are one for each output, whose norms ComfyUI takes
    before the change and not after it; None for any other change.
    """
    try:
        delta, magnitude = delta_of(patch)
    except NotBesideError:
        return None
    if magnitude is None or magnitude.shape[0] != weight.shape[0] or delta.shape != weight.shape:
        return None
    gain = dora_gain(weight, delta, magnitude)[:, None]
    changed = gain * (weight.float() + delta.dense().to(weight.device))
    return weight + strength * (changed - weight)


def _told(file: LoraFile, strength: float, left: dict[str, str]) -> str:
    text = f"{file.name} at {strength:g}: "
    if left:
        first = [f"{key} ({reason})" for key, reason in list(left.items())[:LISTED]]
        more = f" and {len(left) - LISTED} more" if len(left) > LISTED else ""
        text += f"{len(left)} of {file.count} keys not applied: {', '.join(first)}{more}; "
    text += f"{file.count - len(left)} of {file.count} keys applied"
    if file.scaled:
        text += f"; {file.scaled} layers at the alpha that the metadata state"
    if file.others:
        text += f"; {file.others} keys are for a text encoder"
    return text


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What this thread logs as a warning or worse: ComfyUI's formulas log a failure, and go on."""
    found: list[str] = []
    thread = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                found.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(listener)
