"""How the shipped graphs lie on the canvas: readable when opened, no wire behind a node."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
TITLE = 30
SLOT, FIRST_SLOT = 20, 14  # where the page draws sockets
READABLE = 0.65  # below this scale the classic canvas draws nodes without text
VIEW = 1600, 900  # px of a small screen
every_graph = pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)

Box = tuple[float, float, float, float]


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def box(node: dict) -> Box:
    """left, top, right, bottom, with the title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def ways(graph: dict) -> dict[int, list[tuple[float, float]]]:
    """Link -> the points it goes through, in order."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    dots = {dot["id"]: dot for dot in graph["extra"].get("reroutes", [])}
    last = {end["id"]: end["parentId"] for end in graph["extra"].get("linkExtensions", [])}
    found = {}
    for number, source, slot, target, place, _ in graph["links"]:
        (x, y), width = nodes[source]["pos"], nodes[source]["size"][0]
        between, step = [], last.get(number)
        while step:
            assert number in dots[step]["linkIds"]
            between.insert(0, tuple(dots[step]["pos"]))
            step = dots[step].get("parentId")
        to_x, to_y = nodes[target]["pos"]
        found[number] = [
            (x + width, y + FIRST_SLOT + SLOT * slot),
            *between,
            (to_x, to_y + FIRST_SLOT + SLOT * place),
        ]
    return found


def behind(graph: dict) -> list[tuple[int, int]]:
    """(link, node) wherever a link passes behind a node. Sampled in steps of a few units."""
    found = set()
    boxes = {node["id"]: box(node) for node in graph["nodes"]}
    for number, points in ways(graph).items():
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            count = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / 4))
            for i in range(1, count):
                x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
                for node, (left, top, right, bottom) in boxes.items():
                    if left < x < right and top < y < bottom:
                        found.add((number, node))
    return sorted(found)


@every_graph
def test_no_wire_is_behind_a_node(path):
    assert behind(load(path)) == []


@every_graph
def test_it_opens_where_it_can_be_read(path):
    graph = load(path)
    scale, (dx, dy) = graph["extra"]["ds"]["scale"], graph["extra"]["ds"]["offset"]
    assert READABLE <= scale <= 1
    [note] = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    others = [box(node) for node in graph["nodes"] if node is not note]
    left, top, right, bottom = box(note)
    assert right < min(each[0] for each in others) and top <= min(each[1] for each in others)
    shown = ((left + dx) * scale, (top + dy) * scale, (right + dx) * scale)
    assert shown[0] >= 0 and shown[1] >= 0 and shown[2] < VIEW[0]
    # The first files or pictures are in view beside it.
    assert (min(each[2] for each in others) + dx) * scale < VIEW[0]
    assert (bottom + dy) * scale < 1.2 * VIEW[1], "a note that nobody scrolls down"


@every_graph
def test_nodes_are_apart_and_inside_their_groups(path):
    graph = load(path)
    boxes = {node["id"]: box(node) for node in graph["nodes"]}
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other} overlap"
    frames = [group["bounding"] for group in graph["groups"]]
    for (x0, y0, w0, h0), (x1, y1, w1, h1) in itertools.combinations(frames, 2):
        assert x0 + w0 <= x1 or x1 + w1 <= x0 or y0 + h0 <= y1 or y1 + h1 <= y0
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        left, top, right, bottom = boxes[node["id"]]
        # A node that reports grows when it has run.
        bottom += 100 if any(slot["name"] == "report" for slot in node["outputs"]) else 0
        assert any(
            x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in frames
        ), f"{node['type']} sticks out of its group"


@every_graph
def test_two_nodes_with_one_title_do_the_same(path):
    """A title that stands on several nodes of different kinds tells nobody which is which."""
    kinds: dict[str, set[str]] = {}
    for node in load(path)["nodes"]:
        if "title" in node:
            kinds.setdefault(node["title"], set()).add(node["type"])
    assert {title for title, held in kinds.items() if len(held) > 1} == set()


def test_a_wan_graph_speaks_of_no_other_model():
    for path in GRAPHS:
        for node in load(path)["nodes"]:
            bare = node["type"] == "EmptyHunyuanLatentVideo" and "title" not in node
            assert not bare, f"{path.name}: the page calls it 'Empty HunyuanVideo 1.0 Latent'"


def test_a_wire_behind_a_node_is_seen():
    nodes = [
        {"id": i, "pos": [200 * i, 0], "size": [100, 80], "type": "N"} for i in range(3)
    ]  # fmt: skip
    graph = {"nodes": nodes, "links": [[1, 0, 0, 2, 0, "X"]], "extra": {}}
    assert behind(graph) == [(1, 1)]
    graph["extra"] = {
        "reroutes": [
            {"id": 1, "pos": [140, -60], "linkIds": [1]},
            {"id": 2, "pos": [360, -60], "linkIds": [1], "parentId": 1},
        ],
        "linkExtensions": [{"id": 1, "parentId": 2}],
    }
    assert behind(graph) == []
