"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

from .lora_side import FrugalLoraSide

NODES: list = [FrugalLoraSide]
