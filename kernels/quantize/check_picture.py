"""The quality check as a picture: what each call of the model lost, under what each block lost."""

from __future__ import annotations

import numpy as np

from ..chart import INK, LEFT, RIGHT, WIDTH, Axis, bar_between, canvas
from .model_error import ModelError
from .quality import QualityReport
from .quality_picture import picture

HEIGHT = 280
TOP, BOTTOM = 96, 50
COLOUR = (86, 100, 190)


def calls_picture(error: ModelError) -> np.ndarray:
    """uint8 [280, 1024, 3]: rel-L2 of each call as a bar, all together as a line of text. Needs
    Pillow.
    """
    image, draw, fonts = canvas(HEIGHT)
    whole = error.whole
    decibels = "equal" if whole.snr_db is None else f"{whole.snr_db:.1f} dB"
    head = f"end to end: rel-L2 {whole.relative:.4f}, cosine {whole.cosine:.6f}, SNR {decibels}"
    draw.text((LEFT, 12), head, INK, fonts[18])
    draw.text((LEFT, 38), f"{len(error.calls)} calls of {error.recorded[:80]}", INK, fonts[14])
    most = max(call.error.relative for call in error.calls)
    axis = Axis(TOP, HEIGHT - BOTTOM, most, lambda value: f"{value:.4g}")
    axis.draw(draw, fonts, "rel-L2 of the model's output by call")
    slot = (WIDTH - LEFT - RIGHT) / len(error.calls)
    wide = min(0.6 * slot, 60.0)
    for place, call in enumerate(error.calls):
        middle = LEFT + slot * (place + 0.5)
        top = axis.at(call.error.relative)
        bar_between(draw, middle - wide / 2, middle + wide / 2, top, axis.bottom, COLOUR)
        name = str(place + 1) if call.sigma is None else f"{call.sigma:.2f}"
        draw.text((middle, axis.bottom + 6), name, INK, fonts[13], anchor="ma")
    place = ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8)
    draw.text(place, "noise level of the call", INK, fonts[14], anchor="mb")
    return np.asarray(image)


def check_picture(error: ModelError, report: QualityReport | None) -> np.ndarray:
    """uint8 [height, 1024, 3]: the blocks of `report`, where there is one, above the calls."""
    calls = calls_picture(error)
    return calls if report is None else np.concatenate([picture(report), calls])
