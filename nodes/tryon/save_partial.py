"""Finished pictures of a batch that cannot go on, written where the user finds them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...kernels.atomic_write import atomic_write
from .._output import free_number

PREFIX = "frugal/tryon_unfinished"


def save(finished: dict[int, torch.Tensor]) -> str:
    """Write pictures [1, H, W, 3] by number (from 0) as PNG; says in words where they are."""
    if not finished:
        return "no picture was finished"
    folder, name, counter, subfolder = free_number(PREFIX)
    for number, picture in sorted(finished.items()):
        path = os.path.join(folder, f"{name}_{counter:05}_picture_{number + 1}.png")
        pixels = (picture[0].float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8)
        with atomic_write(Path(path)) as unfinished:
            Image.fromarray(pixels).save(unfinished, "png")
    where = f"output/{subfolder}/{name}_{counter:05}_picture_*.png"
    return f"the {len(finished)} finished pictures are in {where}"
