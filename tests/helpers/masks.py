"""Masks that the tests of the mask kernels share."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def blobs(height: int, width: int, seed: int, sigma: float = 2.0) -> np.ndarray:
    """A smooth random picture, 0..1, whose level sets have holes and islands."""
    noise = np.random.default_rng(seed).random((height, width))
    smooth = ndimage.gaussian_filter(noise, sigma) if sigma else noise
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / max(high - low, 1e-9)).astype(np.float32)
