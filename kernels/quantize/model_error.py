"""What a quantised model lost as a whole: its outputs for kept calls against those of the source.

rel-L2 is ||error|| / ||output||, cosine that between both outputs, SNR -20 log10(rel-L2) in dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import FrugalError
from .reference_calls import ReferenceCall

# From here on the two are not one model with rounded weights.
STRANGE = 0.5


@dataclass(frozen=True)
class EndToEnd:
    """The model's output against that of the source for the same inputs: rel-L2, cosine, SNR in dB
    (None: equal), how many numbers were compared.
    """

    relative: float
    cosine: float
    snr_db: float | None
    numbers: int


@dataclass(frozen=True)
class CallError:
    """One call: its noise level, None if unknown, and what was lost in it."""

    sigma: float | None
    error: EndToEnd


@dataclass(frozen=True)
class ModelError:
    """All calls. recorded: the calibration file that holds them. whole: all numbers of all calls
    taken together. notes: what a person should know, as sentences.
    """

    recorded: str
    calls: tuple[CallError, ...]
    whole: EndToEnd
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        return asdict(self)

    def text(self) -> str:
        """The same numbers as lines of text."""
        lines = [f"end to end, {len(self.calls)} calls of {self.recorded}: {_figures(self.whole)}"]
        for number, call in enumerate(self.calls, 1):
            at = "" if call.sigma is None else f" at noise level {call.sigma:.3f}"
            lines.append(f"call {number}{at}: {_figures(call.error)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def model_error(
    recorded: str,
    calls: Sequence[ReferenceCall],
    outputs: Sequence[torch.Tensor],
    notes: Iterable[str] = (),
) -> ModelError:
    """Compare outputs, one for each call, with those that were kept.

    Raises FrugalError where `end_to_end` does.
    """
    errors = tuple(
        CallError(call.sigma, end_to_end(call.output, output))
        for call, output in zip(calls, outputs, strict=True)
    )
    whole = end_to_end(
        torch.cat([call.output.float().flatten() for call in calls]),
        torch.cat([output.float().cpu().flatten() for output in outputs]),
    )
    found = [*notes]
    if whole.relative > STRANGE:
        found.append(
            f"a rel-L2 of {whole.relative:.2f} is not that of rounding: is this the model that was "
            "recorded?"
        )
    return ModelError(recorded, errors, whole, tuple(found))


def from_dict(held: Mapping[str, Any]) -> ModelError:
    """What `to_dict` gave. Raises KeyError or TypeError for anything else."""
    calls = tuple(CallError(call["sigma"], EndToEnd(**call["error"])) for call in held["calls"])
    whole = EndToEnd(**held["whole"])
    return ModelError(str(held["recorded"]), calls, whole, tuple(map(str, held["notes"])))


def end_to_end(reference: torch.Tensor | np.ndarray, output: torch.Tensor | np.ndarray) -> EndToEnd:
    """Compare the source model's output with the quantised model's: same shape, any float type.

    Raises FrugalError for other shapes, numbers that are not finite, or a reference of zeros.
    """
    a = torch.as_tensor(reference).detach().cpu().double().flatten()
    b = torch.as_tensor(output).detach().cpu().double().flatten()
    if tuple(reference.shape) != tuple(output.shape) or not a.numel():
        raise FrugalError(
            f"outputs of shapes {tuple(reference.shape)} and {tuple(output.shape)}",
            "two outputs of one shape",
            "run both models on the same inputs",
        )
    power, stored, noise = float(a @ a), float(b @ b), float((b - a) @ (b - a))
    if not (math.isfinite(noise) and math.isfinite(power) and power > 0):
        raise FrugalError(
            f"outputs of energy {power:g} and {stored:g}",
            "finite outputs that are not zero",
            "look at the models: one of them does not work",
        )
    cosine = float(a @ b) / math.sqrt(power * stored) if stored else 0.0
    loss = 10 * math.log10(power / noise) if noise else None
    return EndToEnd(math.sqrt(noise / power), min(1.0, cosine), loss, a.numel())


def _figures(error: EndToEnd) -> str:
    decibels = "infinite (equal)" if error.snr_db is None else f"{error.snr_db:.1f} dB"
    return f"rel-L2 {error.relative:.4f}, cosine {error.cosine:.6f}, SNR {decibels}"
