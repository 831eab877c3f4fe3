"""A plan at work on a MODEL, and what its run showed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..report import megabytes
from .plan import SAMPLE, MemoryPlan


@dataclass(frozen=True)
class PlanOutcome:
    """Bytes. predicted: everything on the device while sampling; measured: the peak while sampling,
    None where there is no such count. memory_options: those planned, in words. changes:
    what was done in the run because memory ran out.
    """

    predicted: int
    measured: int | None
    budget: int
    fits: bool
    memory_options: str
    streamed: int = 0
    changes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """The numbers as plain types."""
        return asdict(self) | {"changes": list(self.changes)}

    def text(self) -> str:
        measured = "not measured: this device does not count its tensors"
        if self.measured is not None:
            measured = f"{megabytes(self.measured)} measured"
        fits = "fits" if self.fits else "does NOT fit"
        lines = [
            f"memory while sampling: {megabytes(self.predicted)} predicted ({fits} in "
            f"{megabytes(self.budget)}), {measured}; memory options: {self.memory_options}"
        ]
        if self.streamed:
            lines.append(
                f"weights streamed from main memory in every step: {megabytes(self.streamed)}"
            )
        return "\n".join([*lines, *self.changes])


@dataclass
class ActivePlan:
    """A MODEL's plan, and what had to be changed in its latest run because memory ran out."""

    plan: MemoryPlan
    changes: list[str] = field(default_factory=list)

    def outcome(self, measured: int | None) -> PlanOutcome:
        """Of the latest run, with what was measured of it."""
        plan = self.plan
        (phase,) = (each for each in plan.phases if each.name == SAMPLE)
        return PlanOutcome(
            phase.total,
            measured,
            plan.budget,
            phase.total <= plan.budget,
            plan.memory_options.text(),
            plan.streamed,
            tuple(self.changes),
        )
