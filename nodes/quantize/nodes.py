"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

NODES: list = []
