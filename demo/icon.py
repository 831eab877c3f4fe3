"""Draw docs/icon.png, the square picture that the Comfy registry shows: `python -m demo.icon`."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .layout import DEMO

TARGET = DEMO.parent / "docs" / "icon.png"
# The registry takes up to 400 px a side; drawn larger and shrunk, so that edges are smooth.
SIDE, SCALE = 400, 4
GROUND, CLOTH = "#1d2026", "#f2efe6"
# A shirt, in 400ths: shoulder, sleeve, hem and back up, with the collar cut in.
SHIRT = [
    (150, 76), (200, 112), (250, 76), (300, 92), (362, 168), (312, 212), (284, 182), (284, 328),
    (116, 328), (116, 182), (88, 212), (38, 168), (100, 92),
]  # fmt: skip
# Bars of a memory plan on the shirt, below a budget line: (left, top, colour).
BARS = [(145, 214, "#5b8def"), (185, 242, "#43b581"), (225, 228, "#f0a04b")]
BAR_WIDTH, BAR_FOOT, BUDGET, BUDGET_COLOR = 30, 306, 196, "#e0524d"


def draw() -> Image.Image:
    """The icon, 400 x 400 px, RGBA with clear corners."""
    picture = Image.new("RGBA", (SIDE * SCALE, SIDE * SCALE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)

    def scaled(*numbers: int) -> tuple[int, ...]:
        return tuple(number * SCALE for number in numbers)

    pen.rounded_rectangle(scaled(0, 0, SIDE - 1, SIDE - 1), 72 * SCALE, fill=GROUND)
    pen.polygon([scaled(x, y) for x, y in SHIRT], fill=CLOTH)
    for left, top, color in BARS:
        pen.rectangle(scaled(left, top, left + BAR_WIDTH, BAR_FOOT), fill=color)
    pen.line(scaled(128, BUDGET, 272, BUDGET), BUDGET_COLOR, 6 * SCALE)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(TARGET, optimize=True)
