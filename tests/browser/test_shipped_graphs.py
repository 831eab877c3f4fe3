"""Every shipped graph dropped on the canvas: whole, nothing shifted, nothing hidden, both looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frugal.demo.layout import WORKFLOWS
from frugal.tests.helpers.graphs import skip_if_too_old

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
GRAPHS = sorted(WORKFLOWS.glob("*.json"))
SNAPSHOTS = Path(__file__).parents[1] / "workflows" / "api"
SLACK = 2  # px; a frame's own line


@pytest.mark.parametrize("tab", ["classic", "nodes2"], indirect=True)
@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_it_opens_as_it_was_saved(tab, site, path, request):
    skip_if_too_old(site, path)
    graph = json.loads(path.read_text(encoding="utf-8"))
    tab.drop(path)
    found = tab.nodes()
    assert [node["type"] for node in found.values() if not node["known"]] == []
    saved = {node["id"]: node["widgets_values"] for node in graph["nodes"]}
    assert {number: node["saved"] for number, node in found.items()} == saved
    snapshot = json.loads((SNAPSHOTS / path.name).read_text(encoding="utf-8"))
    assert tab.prompt() == snapshot
    tab.fit()
    tab.shoot(f"{path.stem}-{request.node.callspec.params['tab']}")
    boxes = tab.boxes()
    assert set(boxes) == set(found)
    assert overlaps({f"{found[n]['title']} ({n})": box for n, box in boxes.items()}) == []
    assert tab.cut_notes() == []


def overlaps(boxes: dict[str, list[float]]) -> list[tuple[str, str]]:
    """Pairs of [left, top, right, bottom] that cover each other."""
    named = list(boxes.items())
    return [
        (one, other)
        for i, (one, a) in enumerate(named)
        for other, b in named[i + 1 :]
        if min(a[2], b[2]) - max(a[0], b[0]) > SLACK and min(a[3], b[3]) - max(a[1], b[1]) > SLACK
    ]


def test_an_overlap_is_seen():
    assert overlaps({"a": [0, 0, 10, 10], "b": [9, 9, 20, 20], "c": [5, 5, 15, 15]}) == [
        ("a", "c"),
        ("b", "c"),
    ]
