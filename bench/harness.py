"""What every benchmark does: find the pack and ComfyUI, name the commit, write results whole."""

from __future__ import annotations

import importlib.util
import json
import os
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
