"""The nodes of the sampling family; each has a module of its own."""

from __future__ import annotations

from .attention import FrugalAttention
from .compile import FrugalCompile
from .guidance_range import FrugalGuidanceRange
from .sampler import FrugalSampler
from .step_cache import FrugalStepCache

NODES: list[type] = [
    FrugalSampler,
    FrugalAttention,
    FrugalStepCache,
    FrugalGuidanceRange,
    FrugalCompile,
]
