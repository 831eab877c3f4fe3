"""The pack as a user gets it: the archive's files in custom_nodes, and only what it asks for.

Once with nothing but ComfyUI's requirements and the pack's, once with what may be missing missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from frugal.demo.comfy_server import ComfyServer, pack_node_ids
from frugal.tests.helpers.absent import closure, environment, modules_outside, read_requirements
from frugal.tests.helpers.tracked import tracked

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parents[2]
# The folder that the registry makes, which is not the one a checkout has.
FOLDER = "comfyui-frugal"
GRAPH = {
    "doctor": {"class_type": "FrugalDoctor", "inputs": {}},
    "solid": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
    "grown": {
        "class_type": "FrugalMaskGrow",
        "inputs": {"mask": ["solid", 0], "grow": 4, "grow_shape": "disk"},
    },
    "picture": {"class_type": "MaskToImage", "inputs": {"mask": ["grown", 0]}},
    "shown": {"class_type": "PreviewImage", "inputs": {"images": ["picture", 0]}},
}


def copy_archive(target: Path) -> None:
    """What the registry's archive holds: git's files less .comfyignore."""
    pathspec = pytest.importorskip("pathspec")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = pathspec.PathSpec.from_lines("gitignore", lines)
    for name in tracked():
        if not left_out.match_file(name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def boot(
    tree, tmp_path, monkeypatch, absent=(), hidden=()
) -> tuple[set[str], list[str], dict, str]:
    """Node ids of the pack, its log lines at the start, what Doctor found, the whole log."""
    base = tmp_path / "base"
    pack = base / "custom_nodes" / FOLDER
    copy_archive(pack)
    asked = read_requirements(tree / "requirements.txt")
    asked += read_requirements(pack / "requirements.txt")
    # ComfyUI 0.3.75 imports it and does not list it: it used to come with transformers.
    asked.append(Requirement("requests"))
    outside = modules_outside(closure(asked))
    assert {"pytest", "diffusers", "hypothesis"} <= outside, "nothing would be missing"
    for name, value in environment(tmp_path / "site", outside | {*absent}, hidden, pack).items():
        monkeypatch.setenv(name, value)
    with ComfyServer(tree, base, linked=False) as server:
        ours = {name for name in server.object_info() if name.startswith("Frugal")}
        said = [line for line in server.log_text().splitlines() if "[Frugal]" in line]
        result = server.run(GRAPH)
        assert result.status == "success", result.errors
        assert result.outputs["shown"]["images"]
        doctor = json.loads(result.outputs["doctor"]["frugal_doctor"][0])
        return ours, said, doctor, server.log_text()


def test_the_archive_with_its_own_requirements(comfy_tree, tmp_path, monkeypatch):
    ours, said, doctor, _ = boot(comfy_tree, tmp_path, monkeypatch)
    assert ours == pack_node_ids()
    assert said == []
    assert doctor["facts"]["numba"]
    assert not doctor["facts"]["gguf"]


def test_the_archive_without_what_may_be_missing(comfy_tree, tmp_path, monkeypatch):
    """numba and flash-attn cost speed, PyAV is asked for when used, the others cost their nodes."""
    # ComfyUI itself needs these three, so only the pack does without.
    hidden = ("av", "transformers", "aiohttp")
    absent = ("numba", "llvmlite", "flash_attn")
    ours, said, doctor, log = boot(comfy_tree, tmp_path, monkeypatch, absent, hidden)
    off = {"FrugalHumanParse", "FrugalPromptExtend", "FrugalRemoteVideo"}
    assert ours == pack_node_ids() - off
    assert len(said) == 2, said
    assert sum("'transformers'" in line for line in said) == 1
    assert sum("'aiohttp'" in line and "servers" in line for line in said) == 1
    assert not doctor["facts"]["numba"]
    assert "numba" in log.lower(), "the slow way is not announced"
