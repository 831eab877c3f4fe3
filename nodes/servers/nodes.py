"""Nodes that speak with a server that the user typed in."""

from __future__ import annotations

from .prompt import FrugalPromptExtend
from .video import FrugalRemoteVideo

NODES = [FrugalPromptExtend, FrugalRemoteVideo]
