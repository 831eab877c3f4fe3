"""What one run took and what it cost, as data first, then as text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..attention.call_report import Table
from ..errors import FrugalError
from ..report import LoadReport, megabytes
from .meter import GPU, Memory

LONGEST_CURRENCY = 12


@dataclass(frozen=True)
class ModelFacts:
    """A model without a load report: class name, compute dtype, bytes of its weights, dtype ->
    bytes.
    """

    title: str
    dtype: str
    bytes: int
    formats: dict[str, int]


@dataclass(frozen=True)
class Frames:
    """Pictures of the result: how many, width and height in px."""

    count: int
    width: int
    height: int


@dataclass(frozen=True)
class RunReport:
    """seconds: from the start of the run to this reading, None if the start was not seen.
    price_per_hour in `currency`, 0 if not known. models: load reports where the loader left one.
    attention: tables of the models' latest sampling runs, from their attention nodes.
    """

    seconds: float | None
    memory: Memory
    models: tuple[LoadReport | ModelFacts, ...] = ()
    frames: Frames | None = None
    price_per_hour: float = 0.0
    currency: str = "USD"
    attention: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.price_per_hour) and self.price_per_hour >= 0):
            raise FrugalError(
                f"price_per_hour {self.price_per_hour}",
                "0 or more",
                "type in the price of one hour",
            )
        if not 0 < len(self.currency.strip()) <= LONGEST_CURRENCY:
            raise FrugalError(
                f"currency of {len(self.currency)} characters",
                f"1 to {LONGEST_CURRENCY}",
                "type in a currency like USD",
            )

    @property
    def cost(self) -> float | None:
        """seconds / 3600 * price_per_hour, or None where either is not known."""
        if self.seconds is None or not self.price_per_hour:
            return None
        return self.seconds / 3600 * self.price_per_hour

    @property
    def seconds_per_frame(self) -> float | None:
        """Seconds of the run by frame of the result, or None where either is not known."""
        if self.seconds is None or self.frames is None or not self.frames.count:
            return None
        return self.seconds / self.frames.count

    def to_dict(self) -> dict[str, Any]:
        """Every number of the report, JSON-ready."""
        return asdict(self) | {"cost": self.cost, "seconds_per_frame": self.seconds_per_frame}

    def json(self) -> str:
        return json.dumps(self.to_dict())

    def text(self) -> str:
        """The same numbers as lines of text, the sum first."""
        return "\n".join(
            [
                self.verdict(),
                self._time_line(),
                *self._memory_lines(),
                *self._frame_lines(),
                self._cost_line(),
                *(line for model in self.models for line in _model_lines(model)),
                *(line for table in self.attention for line in table.text().split("\n")),
            ]
        )

    def verdict(self) -> str:
        """Pictures, time, cost and peak in one line, as far as they are known."""
        count = self.frames.count if self.frames else 0
        said = [f"{count} frame{'s' if count != 1 else ''}"] if self.frames else []
        said += [] if self.seconds is None else [_time(self.seconds)]
        said += [] if self.cost is None else [f"{_price(self.cost)} {self.currency}"]
        # Of a process it is that of all runs.
        said += [f"peak {megabytes(self.memory.peak)}"] if self.memory.kind == GPU else []
        return ", ".join(said) or "time and cost are not known"

    def _time_line(self) -> str:
        if self.seconds is None:
            return "time: unknown, this server did not announce the start of the run"
        return f"time: {self.seconds:.2f} s from the start of the run to this node"

    def _memory_lines(self) -> list[str]:
        m = self.memory
        if m.kind == GPU:
            counted = "torch allocator"
            if m.streamed:
                counted = f"torch allocator and {megabytes(m.streamed)} of weights in dynamic VRAM"
            return [
                f"GPU memory: {megabytes(m.peak)} at peak in this run, {megabytes(m.now)} now "
                f"({counted}, {m.device})",
                f"whole card now: {megabytes(m.used or 0)} of {megabytes(m.total)}, all programs",
            ]
        return [
            f"memory: {megabytes(m.peak)} at peak since the server started, {megabytes(m.now)} now "
            f"(server process, device {m.device}), of {megabytes(m.total)}"
        ]

    def _frame_lines(self) -> list[str]:
        if self.frames is None:
            return []
        f = self.frames
        line = f"result: {f.count} x {f.width} x {f.height} px"
        each = self.seconds_per_frame
        return [line if each is None else f"{line}, {each:.2f} s each"]

    def _cost_line(self) -> str:
        if not self.price_per_hour:
            return "cost: unknown, no price per hour typed in"
        at = f"at {self.price_per_hour:g} {self.currency} per hour typed in"
        if self.cost is None:
            return f"cost: unknown, the time is not known ({at})"
        return f"cost: {self.cost:.6f} {self.currency} {at}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _price(cost: float) -> str:
    return f"{cost:.2f}" if cost >= 0.01 else f"{cost:.1g}"


def _model_lines(model: LoadReport | ModelFacts) -> list[str]:
    if isinstance(model, LoadReport):
        return model.text().split("\n")
    lines = [f"model: {model.title}, {megabytes(model.bytes)}, computes in {model.dtype}"]
    return lines + [f"weights {name}: {megabytes(size)}" for name, size in model.formats.items()]
