"""Inputs that the nodes which write a model have in common, and what is made of them."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from .._models import file_path, fingerprint, state_of
from . import convert_run


def calibration_input(effect: str) -> io.Combo.Input:
    """Which calibration file; `effect`: what is done with it."""
    return io.Combo.Input(
        "calibration",
        options=convert_run.files(convert_run.CALIBRATION),
        default=convert_run.NONE,
        tooltip=f"Calibration data from Calibrate Wan Model. With it, {effect}",
    )


def lora_inputs() -> list[io.Input]:
    """Which LoRA is merged before anything is rounded, and how strongly."""
    return [
        io.Combo.Input(
            "lora_name",
            options=convert_run.files("loras"),
            default=convert_run.NONE,
            tooltip="A LoRA to merge before quantising.",
        ),
        io.Float.Input(
            "lora_strength",
            default=1.0,
            min=-20.0,
            max=20.0,
            step=0.01,
            tooltip="LoRA strength; 1 = as trained.",
        ),
    ]


def calibration_path(name: str) -> Path | None:
    """The chosen calibration file; None if none is wanted."""
    return None if name == convert_run.NONE else file_path(convert_run.CALIBRATION, name)


def loras(name: str, strength: float) -> list[tuple[Path, float]]:
    """The chosen LoRA with its strength; nothing if none is wanted."""
    return [] if name == convert_run.NONE else [(file_path("loras", name), strength)]


def state(model_name: str, calibration: str, lora_name: str) -> str:
    """Changes when one of the chosen files is replaced."""
    beside = ((convert_run.CALIBRATION, calibration), ("loras", lora_name))
    paths = [file_path(kind, name) for kind, name in beside if name != convert_run.NONE]
    return f"{fingerprint(model_name)};{state_of(*paths)}"
