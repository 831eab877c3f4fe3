"""The memory nodes, and what they do for other families."""

from __future__ import annotations

from .. import _services
from .cross_kv import FrugalWanConstantContext
from .doctor import FrugalDoctor
from .memory_plan import FrugalMemoryPlan
from .planned_run import plan_run
from .run_report import FrugalReport

NODES = [FrugalReport, FrugalDoctor, FrugalMemoryPlan, FrugalWanConstantContext]

_services.offer(_services.PLAN, plan_run)
