"""The nodes of the sampling family; each has a module of its own."""

from __future__ import annotations

from .attention_node import FrugalAttention

NODES: list[type] = [FrugalAttention]
