"""Each shipped graph in the form the server runs, as committed: the same on every ComfyUI.

FRUGAL_WRITE_SNAPSHOTS=1 rewrites tests/workflows/api; tests/browser compares them with what the
real page makes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath

import pytest

from frugal.demo.layout import WORKFLOWS
from frugal.tests.helpers.canvas import without_titles
from frugal.tests.helpers.graphs import FILE_SUFFIXES, skip_if_too_old

pytestmark = pytest.mark.comfy
SNAPSHOTS = Path(__file__).with_name("api")
GRAPHS = sorted(WORKFLOWS.glob("*.json"))


def as_the_page_makes_it(prompt: dict, info: dict) -> dict:
    """A converted graph without what comfy-cli writes into sockets that nothing is linked to."""
    for node in without_titles(prompt).values():
        schema = info[node["class_type"]]["input"]
        declared = {**schema.get("required", {}), **schema.get("optional", {})}
        for name, (_, *options) in declared.items():
            socket = bool(options and options[0].get("forceInput"))
            if socket and not isinstance(node["inputs"].get(name), list):
                node["inputs"].pop(name, None)
    return without_titles(prompt)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_the_graph_means_what_it_meant(server, path):
    skip_if_too_old(server, path)
    made = server.convert(json.loads(path.read_text(encoding="utf-8")))
    made = as_the_page_makes_it(made, server.object_info())
    held = SNAPSHOTS / path.name
    if os.environ.get("FRUGAL_WRITE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        held.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    before = json.loads(held.read_text(encoding="utf-8"))
    assert before == made, "meant so? Then: python -m demo.build_workflows, and the flag above"


def test_no_snapshot_is_left_over():
    assert {path.name for path in SNAPSHOTS.glob("*.json")} == {path.name for path in GRAPHS}


def unknown_to_comfy_cli(prompt: dict, info: dict) -> list[str]:
    """What `comfy workflow validate` finds in an API graph, but for files that are not here."""
    from comfy_cli.cql.engine import Graph

    found = []
    for error in Graph.from_object_info(info).validate_workflow(prompt)["errors"]:
        value = prompt[error["node_id"]]["inputs"].get(error["field"])
        if not (isinstance(value, str) and PurePosixPath(value).suffix.lower() in FILE_SUFFIXES):
            found.append(error["message"])
    return found


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_comfy_workflow_validate_finds_no_fault(server, path):
    skip_if_too_old(server, path)
    prompt = json.loads((SNAPSHOTS / path.name).read_text(encoding="utf-8"))
    assert unknown_to_comfy_cli(prompt, server.object_info()) == []


def test_a_planted_fault_is_found(server):
    prompt = json.loads((SNAPSHOTS / "masks.json").read_text(encoding="utf-8"))
    [key] = [k for k, node in prompt.items() if node["class_type"] == "FrugalMaskTemporal"]
    for name, value in (("mode", "median99"), ("strength", 7.0), ("mask", ["999", 0])):
        planted = json.loads(json.dumps(prompt))
        planted[key]["inputs"][name] = value
        assert unknown_to_comfy_cli(planted, server.object_info()), name
