"""Checks an API graph against /object_info without running it or needing its model files."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

# Nodes of ComfyUI's that came after 0.3.75; the notes of the graphs that have them say so.
NEWER = {"FrameInterpolationModelLoader", "FrameInterpolate"}

# A combo of files lists what this machine has; a graph names what its user should have.
FILE_SUFFIXES = {
    ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json",
    ".png", ".jpg", ".jpeg", ".webp", ".mp4", ".webm",
}  # fmt: skip


def skip_if_too_old(server: Any, path: Path) -> None:
    """Skip the test if a saved graph has NEWER nodes and this ComfyUI lacks them; any other node
    that is missing is a failure.
    """
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    missing = {node["type"] for node in nodes} - {*server.object_info(), "MarkdownNote"}
    assert missing <= NEWER
    if missing:
        pytest.skip(f"this ComfyUI has no {' and no '.join(sorted(missing))}")


def faults(prompt: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """One sentence per fault: unknown node or input, missing or wrong link, value out of range."""
    found = []
    for key, node in prompt.items():
        where = f"{key} {node['class_type']}"
        schema = info.get(node["class_type"])
        if schema is None:
            found.append(f"{where}: no such node")
            continue
        required = schema["input"].get("required", {})
        declared = {**required, **schema["input"].get("optional", {})}
        found += [
            f"{where}: {name} is not given" for name in required if name not in node["inputs"]
        ]
        for name, value in node["inputs"].items():
            # Growing and dynamic inputs are written as parent.child.
            spec = declared.get(name) or declared.get(name.split(".")[0])
            if spec is None:
                found.append(f"{where}: no input {name}")
            elif isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                found += _link_faults(f"{where}.{name}", value, spec, prompt, info)
            elif name in declared:
                found += _value_faults(f"{where}.{name}", value, spec)
    return found


def _link_faults(where: str, link: list, spec: list, prompt: dict, info: dict) -> list[str]:
    source, slot = link
    if source not in prompt:
        return [f"{where}: linked to {source}, which is not there"]
    outputs = info.get(prompt[source]["class_type"], {}).get("output", [])
    if slot >= len(outputs):
        return [f"{where}: linked to output {slot} of {len(outputs)}"]
    wanted = "COMBO" if isinstance(spec[0], list) else spec[0]
    given = "COMBO" if isinstance(outputs[slot], list) else outputs[slot]
    dynamic = wanted.startswith("COMFY_")
    if dynamic or "*" in (wanted, given) or set(wanted.split(",")) & set(given.split(",")):
        return []
    return [f"{where}: takes {wanted}, is given {given}"]


def _value_faults(where: str, value: Any, spec: list) -> list[str]:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options", [])
        is_file = isinstance(value, str) and PurePosixPath(value).suffix.lower() in FILE_SUFFIXES
        return (
            [] if value in choices or is_file else [f"{where}: {value!r} is not one of {choices}"]
        )
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if kind not in kinds:
        return []
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return [f"{where}: {value!r} is no {kind}"]
    if kind in ("INT", "FLOAT"):
        low, high = options.get("min", value), options.get("max", value)
        if not low <= value <= high:
            return [f"{where}: {value} is outside {low} .. {high}"]
    return []
