"""Pictures that a graph on a real server saved or showed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def saved(server, result, node: str) -> np.ndarray:
    """Those of one node of a finished run, in order: uint8 RGB [pictures, height, width, 3]."""
    files = [server.view(**file) for where, file in result.files() if where == node]
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
