"""A memory plan as a picture: one stack of bars per phase, as it would be and as planned."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from ..chart import round_up
from ..report import megabytes
from .plan import CAUSAL_KV, CROSS_KV, EXPANDED, LATENTS, STREAMED, WEIGHTS, WORK, MemoryPlan, Phase

WIDTH, HEIGHT = 1024, 560
LEFT, RIGHT, TOP, BOTTOM = 84, 200, 118, 70
PAPER, INK, FAINT, OVER = (255, 255, 255), (32, 36, 44), (225, 228, 233), (204, 0, 0)
# Distinct for people with any form of colour blindness, after Okabe and Ito (2008).
COLOURS = {
    WEIGHTS: (0, 114, 178),
    STREAMED: (86, 180, 233),
    WORK: (230, 159, 0),
    LATENTS: (0, 158, 115),
    EXPANDED: (204, 121, 167),
    CROSS_KV: (213, 94, 0),
    CAUSAL_KV: (153, 153, 153),
}


def picture(plan: MemoryPlan) -> np.ndarray:
    """uint8 [560, 1024, 3]: for each phase a pair of stacked bars, left without the plan and right
    with it, and the budget as a line. Heights are in proportion to bytes.

    Needs Pillow.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    fonts = {size: ImageFont.load_default(size) for size in (13, 14, 18)}
    most = max(plan.budget, *(phase.total for phase in (*plan.before, *plan.phases)))
    verdict = "fits" if plan.fits else "does not fit"
    draw.text((LEFT, 14), f"{plan.title}: {verdict} in {megabytes(plan.budget)}", INK, fonts[18])
    draw.text((LEFT, 42), plan.job.text(), INK, fonts[14])
    said = textwrap.wrap(f"memory options: {plan.memory_options.text()}", 120)
    draw.multiline_text((LEFT, 62), "\n".join(said), INK, fonts[14])
    _axis(draw, fonts[13], most)
    slot = (WIDTH - LEFT - RIGHT) / len(plan.phases)
    width = min(110.0, slot * 0.32)
    for place, (before, after) in enumerate(zip(plan.before, plan.phases, strict=True)):
        middle = LEFT + slot * (place + 0.5)
        for phase, left in ((before, middle - width - 6), (after, middle + 6)):
            _stack(draw, fonts[13], phase, left, width, most)
        draw.text((middle - 6 - width / 2, HEIGHT - BOTTOM + 6), "before", INK, fonts[13], "ma")
        draw.text((middle + 6 + width / 2, HEIGHT - BOTTOM + 6), "planned", INK, fonts[13], "ma")
        draw.text((middle, HEIGHT - BOTTOM + 28), after.name, INK, fonts[14], "ma")
    y = height_of(plan.budget, most)
    draw.line((LEFT, y, WIDTH - RIGHT, y), OVER, 2)
    draw.text((WIDTH - RIGHT + 6, y), f"budget {megabytes(plan.budget)}", OVER, fonts[13], "lm")
    _legend(draw, fonts[13], plan)
    return np.asarray(image)


def height_of(size: int, most: int) -> int:
    """y in px of a bar of `size` bytes where `most` bytes are the full height."""
    return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * size / max(1, most))


def _axis(draw: Any, font: Any, most: int) -> None:
    step = round(round_up(max(most, 4) / 4))
    for size in range(0, most + 1, step):
        y = height_of(size, most)
        draw.line((LEFT, y, WIDTH - RIGHT, y), FAINT if size else INK)
        unit, name = (1e9, "GB") if step >= 10**8 else (1e6, "MB")
        draw.text((LEFT - 8, y), f"{size / unit:g} {name}", INK, font, "rm")


def _stack(draw: Any, font: Any, phase: Phase, left: float, width: float, most: int) -> None:
    low = 0
    x, right = round(left), round(left + width)
    for name, size in phase.parts.items():
        bottom, top = height_of(low, most), height_of(low + size, most)
        if bottom > top:
            draw.rectangle((x, top, right, bottom - 1), COLOURS[name])
        low += size
    draw.text(((x + right) / 2, height_of(low, most) - 4), megabytes(low), INK, font, "mb")


def _legend(draw: Any, font: Any, plan: MemoryPlan) -> None:
    used = {name for phase in (*plan.before, *plan.phases) for name in phase.parts}
    shown = [name for name in COLOURS if name in used and _most(plan, name)]
    for place, name in enumerate(shown):
        y = HEIGHT - BOTTOM - 20 * (len(shown) - place)
        draw.rectangle((WIDTH - RIGHT + 6, y, WIDTH - RIGHT + 18, y + 12), COLOURS[name])
        draw.text((WIDTH - RIGHT + 24, y - 1), name, INK, font)


def _most(plan: MemoryPlan, name: str) -> int:
    return max(phase.parts.get(name, 0) for phase in (*plan.before, *plan.phases))
