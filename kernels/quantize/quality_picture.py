"""The quality report as a picture: what every block lost, and what it takes, by format."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..chart import INK, LEFT, RIGHT, WIDTH, Axis, bar_between, canvas
from ..formats import table
from .budget import gigabytes
from .quality import OUTSIDE, QualityReport, Summary, summary

HEIGHT = 640
TOP, GAP, BOTTOM = 132, 58, 62
OTHER = (110, 110, 110)
# Distinct for people with any form of colour blindness, after Okabe and Ito (2008).
COLOURS = {
    table.BF16: (153, 153, 153),
    table.FP8: (0, 114, 178),
    table.INT8: (0, 158, 115),
    table.W4A8: (230, 159, 0),
    table.W4A8_G64: (213, 94, 0),
    table.AWQ: (204, 121, 167),
}


def picture(report: QualityReport) -> np.ndarray:
    """uint8 [640, 1024, 3]: above, the root mean square of rel-L2 of each block's layers, one bar
    for each format in it; below, the bytes of the block, stacked by format.

    Needs Pillow.
    """
    image, draw, fonts = canvas(HEIGHT)
    parts = _parts(report)
    _head(draw, fonts, report)
    middle = (TOP + HEIGHT - BOTTOM - GAP) // 2 + 40
    errors = [one.relative for part in parts.values() for one in part.values()]
    sizes = [sum(one.bytes for one in part.values()) for part in parts.values()]
    upper = Axis(TOP, middle, max(errors, default=0.0), lambda value: f"{value:.4g}")
    lower = Axis(middle + GAP, HEIGHT - BOTTOM, max(sizes, default=0), _megabytes)
    upper.draw(draw, fonts, "rel-L2 of the layers' outputs (root mean square by block)")
    lower.draw(draw, fonts, "size of the layers, stacked by format")
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(parts))
    for place, part in enumerate(parts.values()):
        start = LEFT + slot * place
        inside = max(1.0, slot * 0.8)
        bar = min(inside / max(1, len(part)), 26.0)
        left = start + (slot - bar * len(part)) / 2
        stacked = 0
        wide = min(inside, 40.0)
        side = start + (slot - wide) / 2
        for number, (target, one) in enumerate(part.items()):
            colour = COLOURS.get(target, OTHER)
            x = left + bar * number
            bar_between(draw, x, x + bar, upper.at(one.relative), upper.bottom, colour)
            low, stacked = stacked, stacked + one.bytes
            bar_between(draw, side, side + wide, lower.at(stacked), lower.at(low), colour)
    _names(draw, fonts, list(parts), slot, lower.bottom)
    return np.asarray(image)


def _parts(report: QualityReport) -> dict[str, dict[str, Summary]]:
    """Block -> format -> its layers there; what lies outside the blocks is first."""
    held: dict[str, dict[str, list[Any]]] = {}
    for layer in sorted(report.layers, key=lambda layer: layer.block != OUTSIDE):
        held.setdefault(layer.block, {}).setdefault(layer.target, []).append(layer)
    order = list(report.targets)
    return {
        block: {target: summary(found[target]) for target in order if target in found}
        for block, found in held.items()
    }


def _head(draw: Any, fonts: dict[int, Any], report: QualityReport) -> None:
    whole = report.whole
    name = report.file if len(report.file) <= 60 else f"{report.file[:28]}...{report.file[-28:]}"
    draw.text((LEFT, 12), f"{name}: {gigabytes(report.bytes)}", INK, fonts[18])
    line = f"rel-L2 {whole.relative:.4f} over {whole.layers} layers"
    if report.end_to_end is not None:
        line += f", {report.end_to_end.whole.relative:.4f} end to end"
    draw.text((LEFT, 38), f"{line}; {report.basis}", INK, fonts[14])
    x, y = LEFT, 64
    for target, one in report.targets.items():
        text = f"{target}: {one.layers} layers, {_megabytes(one.bytes)}, {one.relative:.4f}"
        length = draw.textlength(text, fonts[14]) + 40
        if x + length > WIDTH - RIGHT and x > LEFT:
            x, y = LEFT, y + 20
        draw.rectangle((x, y + 2, x + 12, y + 14), COLOURS.get(target, OTHER))
        draw.text((x + 18, y), text, INK, fonts[14])
        x += length


def _names(draw: Any, fonts: dict[int, Any], names: list[str], slot: float, y: int) -> None:
    numbers = [_number(name) for name in names]
    widest = max((draw.textlength(text, fonts[13]) for text in numbers), default=0) + 6
    every = max(1, math.ceil(widest / slot))
    for place, text in enumerate(numbers):
        blocks = place - (names[0] == OUTSIDE)
        if text and blocks % every == 0:
            x = LEFT + slot * (place + 0.5)
            draw.text((x, y + 6), text, INK, fonts[13], anchor="ma")
    if names and names[0] == OUTSIDE:
        x, text = LEFT + slot * 0.5, "embeddings, head"
        draw.line((x, y + 6, x, y + 22), INK)
        left = max(8.0, x - draw.textlength(text, fonts[13]) / 2)
        draw.text((left, y + 26), text, INK, fonts[13])
    title = "block (v: VACE)" if any(text.startswith("v") for text in numbers) else "block"
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12), title, INK, fonts[14], anchor="mb")


def _number(block: str) -> str:
    number = "" if block == OUTSIDE else block.rpartition(".")[2]
    return f"v{number}" if block.startswith("vace_") else number


def _megabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
