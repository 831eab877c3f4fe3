"""What charts drawn with Pillow share: a canvas with fonts, a vertical axis, bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

WIDTH, LEFT, RIGHT = 1024, 84, 20
PAPER, INK, FAINT = (255, 255, 255), (32, 36, 44), (225, 228, 233)


def canvas(height: int) -> tuple[Any, Any, dict[int, Any]]:
    """A white picture 1024 px wide, a pen for it, and fonts by size in px (13, 14, 18).

    Needs Pillow.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, height), PAPER)
    fonts = {size: ImageFont.load_default(size) for size in (13, 14, 18)}
    return image, ImageDraw.Draw(image), fonts


class Axis:
    """A vertical axis from zero to a round number at or above `most`, between two heights in px."""

    def __init__(self, top: int, bottom: int, most: float, label: Callable[[float], str]):
        self.top, self.bottom, self.label = top, bottom, label
        self.step = round_up(most / 4) if most > 0 else 0.25
        self.ticks = max(1, math.ceil(most / self.step - 1e-9)) if most > 0 else 4

    def at(self, value: float) -> float:
        """The height of a value, px from the top."""
        return self.bottom - (self.bottom - self.top) * value / (self.step * self.ticks)

    def draw(self, draw: Any, fonts: dict[int, Any], title: str) -> None:
        """Lines with their values across the picture, and the title above."""
        for tick in range(self.ticks + 1):
            y = round(self.at(tick * self.step))
            draw.line((LEFT, y, WIDTH - RIGHT, y), INK if not tick else FAINT)
            draw.text((LEFT - 8, y), self.label(tick * self.step), INK, fonts[13], anchor="rm")
        draw.text((LEFT, self.top - 8), title, INK, fonts[14], anchor="lb")


def round_up(value: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `value`."""
    unit = 10.0 ** math.floor(math.log10(value))
    return unit * next(one for one in (1, 2, 2.5, 5, 10) if one * unit >= value * (1 - 1e-9))


def bar_between(
    draw: Any, left: float, right: float, top: float, bottom: float, colour: Any
) -> None:
    """A bar at least 1 px wide; nothing where it has no height."""
    x, y, low = round(left), round(top), round(bottom)
    if low > y:
        draw.rectangle((x, y, max(x, round(right) - 1), low - 1), colour)
