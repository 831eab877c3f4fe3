"""The public functions: validated input, then the chain."""

from __future__ import annotations

import numpy as np

from ..errors import FrugalError
from . import dispatch, pages
from .settings import RefineSettings

__all__ = [
    "HULLS",
    "RefineSettings",
    "bbox",
    "boxes",
    "frames_of",
    "hull",
    "invert",
    "refine",
    "refine_both",
    "regions",
]

HULLS = ("per_region", "whole", "closing")


def frames_of(mask: np.ndarray) -> np.ndarray:
    """float32 C-contiguous [B, H, W] of a float [H, W], [B, H, W] or [B, 1, H, W] array, shared
    where possible.

    Raises FrugalError for another type or shape.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "f":
        found = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise FrugalError(f"a mask of type {found}", "a float array", "convert the mask to float32")
    if mask.ndim not in (2, 3) and not (mask.ndim == 4 and mask.shape[1] == 1):
        raise FrugalError(
            f"a mask of shape {list(mask.shape)}",
            "[height, width], [frames, height, width] or [frames, 1, height, width]",
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
    progress: dispatch.Progress | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Refine a mask or a clip of masks; the steps and their order are those of `RefineSettings`.

    mask: float [B, H, W] or [H, W], values 0..1, of others above 1 counts as 1, below 0 and NaN as
    0; never changed. Returns a new float32 [B, H, W]. progress(done, total) runs in the calling
    thread after each share of the frames and may raise to cancel.
    threads: None takes the cores available, at most 8; the result does not depend on it. Raises
    FrugalError for a mask of another type or shape.
    """
    frames = frames_of(mask)
    if not len(frames):
        return np.empty(frames.shape, np.float32)
    return dispatch.run_chain(frames, settings, progress, threads)


def refine_both(
    mask: np.ndarray,
    settings: RefineSettings,
    progress: dispatch.Progress | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`refine` and 1 minus its result, both new float32 [B, H, W], in one pass."""
    frames = frames_of(mask)
    inverse = pages.fresh(frames.shape)
    if not len(frames):
        return inverse, inverse.copy()
    return dispatch.run_chain(frames, settings, progress, threads, inverse=inverse), inverse


def hull(
    mask: np.ndarray,
    mode: str,
    radius: int = 16,
    threshold: float = 0.5,
    progress: dispatch.Progress | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Close the dents of a mask; what lies above `threshold` is inside. Returns float32 [B, H, W]
    of 0 and 1.

    mode "per_region": convex hull of each 8-connected region of a frame. "whole": one hull round
    all pixels of a frame. "closing": morphological closing by a disk of `radius` px, which fills
    gaps narrower than twice that and leaves wider ones. A hull holds the pixels whose centre lies
    in the polygon of pixel centres or on its edge. progress, threads: as of `refine`. Raises
    FrugalError for an unknown mode, a radius outside 1 to 512 or a mask of another type.
    """
    if mode not in HULLS:
        raise FrugalError(f"mode {mode!r}", f"one of {', '.join(HULLS)}", "choose another mode")
    frames = frames_of(mask)
    if mode != "closing":
        RefineSettings(threshold=threshold)
        return dispatch.run_hull(frames, threshold, mode == "whole", progress, threads)
    if radius < 1:
        raise FrugalError(f"radius {radius} px", "1 to 512 px", "set radius inside that range")
    out = refine(frames, RefineSettings(threshold=threshold, grow=radius), None, threads)
    return refine(out, RefineSettings(grow=-radius), progress, threads)


# A region below this share of the frame's largest is a speck: it moves no box. 1 in 1000 is a dot
# of 25 px across beside a coat of 800 x 600 px.
SPECK = 1000


def boxes(mask: np.ndarray) -> np.ndarray:
    """Tight box of every frame, int64 [B, 4] of x, y, width, height in px; width and height 0 where
    a frame is empty. Errors as of `refine`.

    The rule of every box in the pack: what lies above empty by half an 8-bit step counts, as for
    `regions`, but no region of less than a thousandth of the largest one's pixels in that frame.
    """
    return dispatch.run_boxes(frames_of(mask), float(RefineSettings.SOFT_EMPTY), SPECK)


def regions(mask: np.ndarray) -> np.ndarray:
    """Number of regions in every frame, int64 [B]: what lies above empty by half an 8-bit step and
    hangs together, corners included. Errors as of `refine`.
    """
    return dispatch.run_count(frames_of(mask), float(RefineSettings.SOFT_EMPTY))


def invert(mask: np.ndarray) -> np.ndarray:
    """1 - mask, as a new float32 array."""
    return np.subtract(np.float32(1), mask, out=pages.fresh(mask.shape))


def bbox(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Smallest box (x, y, width, height in px) around the `boxes` of all frames, or None for an
    empty mask.

    mask: float [B, H, W] or [H, W]. Raises FrugalError for another type or shape.
    """
    found = boxes(mask)
    found = found[found[:, 2] > 0]
    if not len(found):
        return None
    (x, y), (right, bottom) = found[:, :2].min(0), (found[:, :2] + found[:, 2:]).max(0)
    return int(x), int(y), int(right - x), int(bottom - y)
