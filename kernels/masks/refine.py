"""The public functions: validated input, then the chain."""

from __future__ import annotations

import numpy as np

from ..errors import FrugalError
from . import driver
from .settings import RefineSettings

__all__ = ["RefineSettings", "bbox", "invert", "refine"]


def _frames(mask: np.ndarray) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "f":
        found = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise FrugalError(f"a mask of type {found}", "a float array", "convert the mask to float32")
    if mask.ndim not in (2, 3):
        raise FrugalError(
            f"a mask of shape {list(mask.shape)}",
            "[height, width] or [frames, height, width]",
            "connect a MASK, not an image or a latent",
        )
    if 0 in mask.shape[-2:]:
        raise FrugalError(
            f"a mask of {mask.shape[-1]} x {mask.shape[-2]} px",
            "at least 1 x 1 px",
            "check the node before",
        )
    return np.ascontiguousarray(mask.reshape((-1, *mask.shape[-2:])), np.float32)


def refine(
    mask: np.ndarray,
    settings: RefineSettings,
    progress: driver.Progress | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Refine a mask or a clip of masks; the steps and their order are those of `RefineSettings`.

    mask: float [B, H, W] or [H, W], values 0..1, NaN counts as 0; never changed. Returns a new
    float32 [B, H, W]. progress(done, total) runs in the calling thread after each share of the
    frames and may raise to cancel.
    threads: None takes the cores available, at most 8; the result does not depend on it. Raises
    FrugalError for a mask of another type or shape.
    """
    frames = _frames(mask)
    if not len(frames):
        return np.empty(frames.shape, np.float32)
    return driver.run_chain(frames, settings, progress, threads)


def invert(mask: np.ndarray) -> np.ndarray:
    """1 - mask, as a new float32 array."""
    return np.subtract(np.float32(1), mask, out=np.empty(mask.shape, np.float32))


def bbox(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Smallest box (x, y, width, height in px) around every value above 0 in any frame, or None
    for an empty mask.

    mask: float [B, H, W] or [H, W]. Raises FrugalError for another type or shape.
    """
    frames = _frames(mask)
    if not len(frames):
        return None
    columns, rows = (np.flatnonzero(seen) for seen in driver.bounds(frames))
    if not len(columns):
        return None
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1
