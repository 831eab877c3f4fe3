"""Measured choices on disk, so that a shape is measured once per machine and not once per run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .. import json_text
from ..atomic_write import atomic_write
from .measure import Decision

FORMAT = 1


def place_key(device: torch.device, packages: str, default: str) -> str:
    """What a time depends on besides the shape: the device's name, PyTorch, the kernel packages,
    and which attention stands as the default.
    """
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"cpu x{torch.get_num_threads()}"
    return f"{name} | torch {torch.__version__} | {packages or 'no packages'} | {default}"


def load(path: Path) -> dict[str, Decision]:
    """Key -> choice. A file that is not there or cannot be understood is an empty one: what it
    held is measured again.
    """
    try:
        held = json_text.parse(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            return {}
        return {key: _read(entry) for key, entry in held["choices"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def save(path: Path, fresh: dict[str, Decision]) -> None:
    """Add what lasts of `fresh` to the file. Raises OSError where the folder cannot be written."""
    every = {**load(path), **{key: each for key, each in fresh.items() if each.lasting}}
    entries = {
        key: {"ranking": list(map(list, d.ranking)), "refused": d.refused, "scaled": d.scaled}
        for key, d in sorted(every.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        text = json.dumps({"format": FORMAT, "choices": entries}, indent=1)
        unfinished.write_text(text, encoding="utf-8")


def _read(entry: dict) -> Decision:
    ranking = tuple((str(name), float(seconds)) for name, seconds in entry["ranking"])
    refused = {str(name): str(why) for name, why in entry["refused"].items()}
    return Decision(ranking, refused, bool(entry["scaled"]))
