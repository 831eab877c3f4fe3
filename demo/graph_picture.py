"""A small picture of a saved graph: what a template card shows where no result can be shown."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, TITLE, SLOT = 1200, 30, 26
LINK_COLORS = {"MODEL": "#b39ddb", "IMAGE": "#64b5f6", "MASK": "#81c784", "VAE": "#ff6e6e"}


def draw(graph: dict[str, Any]) -> Image.Image:
    """Groups, nodes and links of a graph from `graph_builder.build`, 1200 px wide."""
    boxes = [group["bounding"] for group in graph["groups"]]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    k = WIDTH / (right - left)
    picture = Image.new("RGB", (WIDTH, round((bottom - top) * k)), "#1c1c1c")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - left) * k, (y - top) * k

    for group in graph["groups"]:
        x, y, w, h = group["bounding"]
        pen.rectangle((*at(x, y), *at(x + w, y + h)), fill="#262626", outline=group["color"])
        pen.text(at(x + 14, y + 8), group["title"], group["color"], font)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, slot, target, place, kind in graph["links"]:
        (x0, y0), (x1, y1) = nodes[source]["pos"], nodes[target]["pos"]
        start = at(x0 + nodes[source]["size"][0], y0 + SLOT * (slot + 0.6))
        end = at(x1, y1 + SLOT * (place + 0.6))
        pen.line((start, end), LINK_COLORS.get(kind, "#ffb74d"), 2)
    for node in nodes.values():
        (x, y), (w, h) = node["pos"], node["size"]
        pen.rounded_rectangle(
            (*at(x, y - TITLE), *at(x + w, y + h)), 5, fill="#3a3a3a", outline="#555555"
        )
        pen.text(at(x + 8, y - TITLE + 2), node.get("title") or node["type"], "white", font)
    return picture
