"""The LoRA nodes."""

from __future__ import annotations

from .unmerged import FrugalLoraSide

NODES = [FrugalLoraSide]
