"""Where nodes and wires of a shipped graph lie on the canvas, in canvas units.

Nodes stand in columns. A wire to the next column crosses the gap between the two; every other wire
is led round the nodes by reroutes, which the page draws as dots: over the top of the columns, or,
inside one column, through the space above the node that it goes to.
"""

from __future__ import annotations

from typing import Any

GAP, TITLE, MARGIN = 40, 30, 20
ACROSS = 150  # between columns; wires run up and down in it
TEXT = 110  # below a node that shows text once it has run
SLOT, FIRST_SLOT = 20, 14  # height of a socket's row, centre of the first
TURN, STEP = 36, 12  # how far from a node a wire turns, and how far apart two wires are
# What a page shows of a graph: from here on the classic canvas draws the text of nodes.
SCALE, LEFT, TOP = 0.7, 110, 190


def view() -> dict[str, Any]:
    """Scale and offset that put the upper left node into the upper left corner, clear of bars."""
    return {"scale": SCALE, "offset": [LEFT / SCALE, TOP / SCALE]}


def stand_in_columns(columns: dict[int, list[dict[str, Any]]]) -> None:
    """Set `pos` of the nodes, and one width for all nodes of a column."""
    x = 0
    for number in sorted(columns):
        y, width = 0, max(node["size"][0] for node in columns[number])
        for node in columns[number]:
            node["pos"], node["size"][0] = [x, y], width
            y = _bottom(node) + TITLE + GAP
        x += width + ACROSS


def _bottom(node: dict[str, Any]) -> int:
    """Where a node ends, with the text that it will show."""
    reports = any(slot["name"] == "report" for slot in node.get("outputs", []))
    return node["pos"][1] + node["size"][1] + (TEXT if reports else 0)


def frame(nodes: list[dict[str, Any]]) -> list[int]:
    """[x, y, width, height] round the nodes, their titles and later texts included."""
    left = min(node["pos"][0] for node in nodes) - MARGIN
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + MARGIN
    bottom = max(map(_bottom, nodes)) + MARGIN
    return [left, -2 * TITLE - MARGIN, right - left, bottom + 2 * TITLE + MARGIN]


def routed(columns: dict[int, list[dict[str, Any]]], links: list[list[Any]]) -> dict[str, Any]:
    """Entries of a graph's `extra` that lead the links [id, from, slot, to, place, type] round the
    nodes. Links of one output share their way as far as it is the same.
    """
    order = {number: i for i, number in enumerate(sorted(columns))}
    nodes = {node["id"]: node for column in columns.values() for node in column}
    column = {node["id"]: order[n] for n, held in columns.items() for node in held}
    dots: list[dict[str, Any]] = []
    ends, trunks = [], {}
    # How many wires already turn in the gap right of a column, and left of one.
    right, left = [0] * len(order), [0] * len(order)
    lanes = 0

    def dot(x: float, y: float, before: int | None) -> int:
        made: dict[str, Any] = {"id": len(dots) + 1, "pos": [round(x), round(y)], "linkIds": []}
        dots.append(made | ({"parentId": before} if before else {}))
        return len(dots)

    for number, source, slot, target, place, _ in links:
        here, there = column[source], column[target]
        if there == here + 1:
            continue
        out_x = nodes[source]["pos"][0] + nodes[source]["size"][0]
        out_y = _slot_y(nodes[source], slot)
        in_x, in_y = nodes[target]["pos"][0], _slot_y(nodes[target], place)
        above = there != here
        if (source, slot, above) not in trunks:
            x = out_x + TURN + STEP * right[here]
            right[here] += 1
            first = dot(x, out_y, None)
            if above:
                lanes += 1
                y = -2 * TITLE - MARGIN - STEP * lanes
                trunks[source, slot, above] = dot(x, y, first), x, y
            else:
                trunks[source, slot, above] = first, x, 0
        last, x, y = trunks[source, slot, above]
        if not above:
            y = nodes[target]["pos"][1] - TITLE - GAP / 2
            last = dot(x, y, last)
        x = in_x - TURN - STEP * left[there]
        left[there] += 1
        last = dot(x, in_y, dot(x, y, last))
        ends.append({"id": number, "parentId": last})
        step: int | None = last
        while step:
            dots[step - 1]["linkIds"].append(number)
            step = dots[step - 1].get("parentId")
    return {"reroutes": dots, "linkExtensions": ends} if dots else {}


def _slot_y(node: dict[str, Any], slot: int) -> int:
    return node["pos"][1] + FIRST_SLOT + SLOT * slot
