"""Inputs that several nodes of this family have."""

from __future__ import annotations

from comfy_api.v0_0_2 import io


def percent_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A place in the schedule: 0 is its start, 1 its end."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def model_input() -> io.Model.Input:
    """The model whose clone the node changes."""
    return io.Model.Input("base_model", tooltip="The model, with its LoRAs already applied.")
