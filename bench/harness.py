"""What every benchmark does: find the pack and ComfyUI, name the commit, write results whole."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def enter(tree: str | Path | None = None) -> ModuleType:
    """Import the pack as `frugal` and ComfyUI as the tests do; returns the tests' conftest.

    tree: the ComfyUI folder, or "none"; left out, what the environment names.
    """
    # The names of the scripts here are nobody else's business.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != RESULTS.parent]
    if tree is not None:
        os.environ["FRUGAL_COMFYUI_TREE"] = str(tree)
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    assert spec and spec.loader
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return conftest


def commit() -> str:
    """The short name of the commit that is checked out, with -dirty if files differ from it; empty
    outside of git.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    """Model and matrix units of this CPU, as Linux tells; the bare architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in facts.get("flags", "")]
    name = facts.get("model name") or platform.machine()
    return f"{name}, {' and '.join(units) or 'no bf16 units'}"


def place(tree: str, device: Any) -> dict[str, Any]:
    """What the figures of a run with this ComfyUI on this torch device depend on."""
    import torch

    on_cpu = device.type == "cpu"
    return {
        "tree": Path(tree).name,
        "torch": torch.__version__,
        "commit": commit(),
        "device": cpu_name() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser of `TREE RESULT.json`, or `--table RESULT.json ...` instead."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("tree", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    return parser


def write(path: Path, result: Any) -> None:
    """Write `result` as JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def each_tree(script: str, results: str, trees: list[str]) -> dict[str, Any]:
    """The last line, JSON, that `python script --one TREE` prints, by the name of the ComfyUI tree;
    each from a process of its own, written to `results` as it comes.
    """
    found = {"device": "cpu", "commit": commit(), "load_average": os.getloadavg()}
    rows = {}
    for tree in trees:
        command = [sys.executable, script, "--one", tree]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[Path(tree).name] = json.loads(done.stdout.splitlines()[-1])
        write(Path(results), found | rows)
    return rows
