"""Comparison sheet of the demo: rows of labelled pictures, and the one PSNR used everywhere."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE = 8, 20


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3], inside mask [H, W] > 0."""
    difference = (a.astype(np.float64) - b.astype(np.float64))[mask > 0]
    return float(10 * np.log10(255**2 / max(float(np.mean(difference**2)), 1e-12)))


def sheet(
    rows: list[dict[str, np.ndarray]], title: str, notes: list[str], zoom: int = 2
) -> Image.Image:
    """Rows of equal pictures uint8 [H, W, 3] by label; labels stand over the first row, one note
    beside each row.
    """
    height, width = next(iter(rows[0].values())).shape[:2]
    cell_w, cell_h = width * zoom + MARGIN, height * zoom + MARGIN
    labels = list(rows[0])
    canvas = Image.new(
        "RGB", (cell_w * len(labels) + MARGIN, 3 * LINE + (cell_h + LINE) * len(rows)), "white"
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.text((MARGIN, 4), title, "black", font)
    for column, label in enumerate(labels):
        draw.text((MARGIN + column * cell_w, LINE + 8), label, "black", font)
    for number, (row, note) in enumerate(zip(rows, notes, strict=True)):
        top = 2 * LINE + 12 + number * (cell_h + LINE)
        for column, label in enumerate(labels):
            picture = Image.fromarray(row[label]).resize(
                (width * zoom, height * zoom), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (MARGIN + column * cell_w, top))
        draw.text((MARGIN, top + cell_h - 4), note, "#555555", font)
    return canvas
