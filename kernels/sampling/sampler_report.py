"""What a sampling run did and took: data first, then text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..attention.call_report import Table
from ..compile.report import CompileReport
from ..memory.active_plan import PlanOutcome
from .step_report import StepCacheReport


@dataclass(frozen=True)
class SamplerReport:
    """seconds: of the whole run, loading the model included. attention: the kernels of this run, if
    they were chosen here. caches: one report for each run of
    steps (two where experts switch). memory: what was planned and what it took, if there was a
    plan. notes: what the preset changed and what it left alone.
    compiled: what compiling the blocks did, if they were.
    """

    preset: str
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    seconds: float
    attention: Table | None = None
    caches: tuple[StepCacheReport, ...] = ()
    notes: tuple[str, ...] = ()
    memory: PlanOutcome | None = None
    compiled: CompileReport | None = None

    def text(self) -> str:
        lines = [
            f"{self.steps} steps, {self.seconds:.2f} s, "
            f"{self.seconds / max(1, self.steps):.2f} s per step, loading included",
            f"{self.sampler}, {self.scheduler}, cfg {self.cfg:g}, preset {self.preset}",
        ]
        lines += [cache.text() for cache in self.caches]
        lines += [self.memory.text()] if self.memory else []
        lines += [self.attention.text()] if self.attention else []
        lines += [self.compiled.text()] if self.compiled else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(
            {
                "preset": self.preset,
                "sampler": self.sampler,
                "scheduler": self.scheduler,
                "steps": self.steps,
                "cfg": self.cfg,
                "seconds": round(self.seconds, 3),
                "attention": asdict(self.attention) if self.attention else None,
                "memory": self.memory.data() if self.memory else None,
                "step_cache": [cache.data() for cache in self.caches],
                "notes": list(self.notes),
                "compiled": self.compiled.data() if self.compiled else None,
            }
        )
