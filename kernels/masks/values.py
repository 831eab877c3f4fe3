"""The one rule for values that no mask has: above 1 is 1, below 0 and NaN are 0."""

from __future__ import annotations

import numpy as np


def bounded(mask: np.ndarray) -> np.ndarray:
    """A float32 mask of any shape with values in 0..1: the same array where it has no others."""
    if not mask.size or (mask.min() >= 0 and mask.max() <= 1):  # NaN compares as false
        return mask
    return np.clip(np.nan_to_num(mask, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
