"""The parts that measure graphs on a card, at their smallest and on the CPU: the whole way from the
command to its JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ["wan_1.3b", "catvton"]


def test_two_graphs_into_one_json(comfy_tree, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), str(comfy_tree), str(out)]
    command += ["--tiny", "--minutes", "60", "--folder", str(tmp_path), "--parts", *PARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    held = json.loads(out.read_text("utf-8"))
    assert held["simulated"] and held["parts"]["environment"]["result"]["comfyui"]
    wan, tryon = (held["parts"][name]["result"] for name in PARTS)
    assert [row["label"] for row in wan["rows"]] == [
        "native",
        "plan, all that is free",
        "plan, 12 GB",
    ]
    for row in wan["rows"]:
        assert row["status"] == "success" and len(row["steps"]) == 3
    assert all(row["finite"] for row in wan["rows"][:2])
    assert wan["rows"][2]["plan"]["budget"] == 12 * 10**9
    assert [row["label"] for row in tryon["rows"]] == ["as stored", "int8", "fp8"]
    assert all(len(row["steps"]) == 4 for row in tryon["rows"])
    assert not list(tmp_path.glob("frugal-gpu-*"))
