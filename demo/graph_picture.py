"""What a template card shows: a square picture that can be read at the size of a stamp.

The page shows cards about 240 px wide, so a card carries the note's heading, the groups as steps,
and below them the graph itself or pictures that the graph made.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE, EDGE = 800, 36
TITLE, SLOT = 30, 26
HEADING, STEP = 54, 38
BADGE = 118  # the page lays "Node graph" over the upper left corner, down to here
LINK_COLORS = {"MODEL": "#b39ddb", "IMAGE": "#64b5f6", "MASK": "#81c784", "VAE": "#ff6e6e"}


def card(graph: dict[str, Any], pictures: Sequence[Image.Image] = ()) -> Image.Image:
    """The card of a graph from `graph_builder.build`, 800 x 800 px. pictures: shown side by side in
    place of the graph.
    """
    made = Image.new("RGB", (SIDE, SIDE), "#1c1c1c")
    pen = ImageDraw.Draw(made)
    y = BADGE
    for line in textwrap.wrap(heading(graph), 25):
        pen.text((EDGE, y), line, "white", ImageFont.load_default(HEADING))
        y += HEADING + 10
    y += 8
    for group in graph["groups"]:
        pen.rounded_rectangle((EDGE, y, SIDE - EDGE, y + STEP + 22), 12, fill=group["color"])
        pen.text((EDGE + 20, y + 6), group["title"], "white", ImageFont.load_default(STEP))
        y += STEP + 32
    room = (SIDE - 2 * EDGE, SIDE - y - EDGE)
    shown = beside(pictures, room) if pictures else miniature(graph, room)
    made.paste(shown, ((SIDE - shown.width) // 2, y + (SIDE - EDGE - y - shown.height) // 2 + 10))
    return made


def heading(graph: dict[str, Any]) -> str:
    """The first line of the graph's note."""
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    return notes[0]["widgets_values"][0].split("\n")[0].lstrip("# ")


def beside(pictures: Sequence[Image.Image], room: tuple[int, int]) -> Image.Image:
    """The pictures in a row, as large as `room` (width, height in px) lets them be."""
    gap = 12
    across = sum(each.width / each.height for each in pictures)
    height = int(min(room[1], (room[0] - gap * (len(pictures) - 1)) / across))
    sized = [each.resize((round(each.width * height / each.height), height)) for each in pictures]
    row = Image.new("RGB", (sum(each.width + gap for each in sized) - gap, height), "#1c1c1c")
    x = 0
    for each in sized:
        row.paste(each, (x, 0))
        x += each.width + gap
    return row


def miniature(graph: dict[str, Any], room: tuple[int, int]) -> Image.Image:
    """Groups, nodes and links, to scale, within `room` (width, height in px)."""
    boxes = [group["bounding"] for group in graph["groups"]]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    k = min(room[0] / (right - left), room[1] / (bottom - top))
    picture = Image.new("RGB", (round((right - left) * k), round((bottom - top) * k)), "#1c1c1c")
    pen = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - left) * k, (y - top) * k

    for group in graph["groups"]:
        x, y, w, h = group["bounding"]
        pen.rectangle((*at(x, y), *at(x + w, y + h)), fill="#262626", outline=group["color"])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        (x, y), (w, h) = node["pos"], node["size"]
        fill = node.get("bgcolor", "#4a4a4a")
        pen.rounded_rectangle((*at(x, y - TITLE), *at(x + w, y + h)), 3, fill=fill)
    for _, source, slot, target, place, kind in graph["links"]:
        (x0, y0), (x1, y1) = nodes[source]["pos"], nodes[target]["pos"]
        start = at(x0 + nodes[source]["size"][0], y0 + SLOT * (slot + 0.6))
        end = at(x1, y1 + SLOT * (place + 0.6))
        pen.line((start, end), LINK_COLORS.get(kind, "#ffb74d"), 2)
    return picture
