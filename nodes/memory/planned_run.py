"""A memory plan for samplers of other families: planned, run, and compared with what was needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels.errors import FrugalError
from ...kernels.memory.active_plan import ActivePlan, PlanOutcome
from .._comfy import PLAN_KEY
from . import memory_plan_run, meta_models, run_report_run


class PlannedRun:
    """A MODEL with a plan at work, and the reading of one run of it."""

    def __init__(self, model: Any, in_force: ActivePlan):
        self.model, self._in_force = model, in_force
        self._peak: Callable[[], int | None] = lambda: None

    def start(self) -> None:
        """The run begins."""
        self._peak = run_report_run.METER.part(self.model.load_device)

    def outcome(self) -> PlanOutcome:
        """Of the run that just ended."""
        return self._in_force.outcome(self._peak())


def plan_run(model: Any, latent: dict[str, Any], guided: bool) -> PlannedRun | str:
    """`model` planned for a run on LATENT with all the memory there is, or as it was planned
    before; the reason in words where it cannot be.
    """
    before = model.get_attachment(PLAN_KEY)
    if before is not None:
        return PlannedRun(model, before)
    try:
        # First of all, since latents of other models may be of any kind.
        meta_models.check(model.model, causal=True)
        job = memory_plan_run.job_of(latent, 0, 0, 0, 0, guided)
        plan, peaks = memory_plan_run.plan_of(model, job, 0)
    except FrugalError as error:
        return error.found
    planned = memory_plan_run.apply(model, plan, peaks, False, None)
    return PlannedRun(planned, planned.get_attachment(PLAN_KEY))
