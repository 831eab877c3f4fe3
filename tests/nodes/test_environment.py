"""Installing the pack changes nothing that ComfyUI chose: pip's own resolver says so.

ComfyUI's packages are held at the versions installed here, and the pack's lists are resolved on top
of them, as if nothing were installed, against the package index.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from frugal.tests.helpers.absent import closure, plain, read_requirements
from frugal.tests.helpers.patience import HANG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def held(comfy_tree) -> dict[str, str]:
    """Version of every installed package that ComfyUI's own list pulls in."""
    names = closure(read_requirements(comfy_tree / "requirements.txt"))
    assert {"torch", "numpy", "pillow", "transformers", "safetensors", "aiohttp"} <= names
    # The index has no builds with a local mark such as +cu130.
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def resolve(folder: Path, wanted: list[str], held: dict[str, str]) -> dict[str, str]:
    """What pip would install for `wanted`, name -> version; raises AssertionError if it cannot."""
    constraints, report = folder / "held.txt", folder / "report.json"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q"]
    command += ["--report", str(report), "-c", str(constraints), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        plain(one["metadata"]["name"]): one["metadata"]["version"].partition("+")[0]
        for one in entries
    }


def test_the_requirements_change_no_package_of_comfyui(tmp_path, held):
    found = resolve(tmp_path, ["-r", str(ROOT / "requirements.txt")], held)
    assert {"numba", "safetensors"} <= set(found), "nothing was resolved"
    changed = {
        name: version for name, version in found.items() if held.get(name, version) != version
    }
    assert not changed


def test_the_extras_name_no_version_of_comfyuis_packages(held):
    """Without a version pip keeps what is there; the extras are for people, not for Manager."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            name = plain(re.split(r"[^A-Za-z0-9_.-]", line)[0])
            if name in held:
                assert name == plain(line), f"the extra {extra} asks for {line}"


def test_a_pin_would_be_seen(tmp_path, held):
    with pytest.raises(AssertionError, match="numpy"):
        resolve(tmp_path, ["numba", "numpy<2"], held)
