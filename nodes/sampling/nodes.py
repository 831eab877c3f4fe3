"""The nodes of the sampling family; each has a module of its own."""

from __future__ import annotations

NODES: list[type] = []
