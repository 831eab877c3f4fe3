"""Nodes that speak with a server that the user typed in."""

from __future__ import annotations

from .prompt_node import FrugalPromptExtend
from .video_node import FrugalRemoteVideo

NODES = [FrugalPromptExtend, FrugalRemoteVideo]
