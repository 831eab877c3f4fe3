"""Results in large pages: memory that nobody has touched costs more than most of the work here.

The kernel hands out fresh memory page by page, with an interruption each, at 4 KB a page by
default. NumPy asks for pages of 2 MB where an array has 4 MB or more; a picture's mask has less,
and an array that does not begin on such a page loses its ends.
"""

from __future__ import annotations

import math
import sys

import numpy as np

PAGE = 1 << 21
FROM = 1 << 20


def fresh(shape: tuple[int, ...]) -> np.ndarray:
    """A new uninitialised C-contiguous float32 array; from 1 MB on it begins on a 2 MB page, so up
    to 4 MB more are reserved, and at most 2 MB more used.
    """
    size = 4 * math.prod(shape)
    if size < FROM or sys.platform != "linux":
        return np.empty(shape, np.float32)
    raw = np.empty(max(size + PAGE, 2 * PAGE), np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size].view(np.float32).reshape(shape)
