"""Where the demo keeps things, for all of its scripts."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parent
MODELS = DEMO / "models"
WORKFLOWS = DEMO.parent / "workflows"
LABEL = "drawn figures, not photos"
