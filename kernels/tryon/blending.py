"""How a painted window fades into its photo: a weight per pixel, from the mask.

The edge is softened at the canvas's size, so that it is as wide beside the garment in a phone photo
as in a thumbnail, and costs no more.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..errors import FrugalError
from . import geometry, pictures
from .geometry import Placement

INSIDE, BOTH = "inside the mask", "both sides"
BLENDS = (INSIDE, BOTH)
REACHED = 0.95  # weight that the middle of a mask gets at least, or the blur is halved


def weights(mask: torch.Tensor, place: Placement, blur: float, blend: str) -> torch.Tensor:
    """Share of the painted picture, float32 [h, w] of the window of `place`, for a mask [H, W] of 0
    and 1 at photo size.

    blur: standard deviation in canvas px of the Gaussian that softens the edge. blend "inside the
    mask": the weight rises from 0 at the mask's edge inwards and is 0 wherever the mask is; halved
    until the mask has a place with a weight near 1. "both sides": one half at the edge, and pixels
    beyond it change up to 3 blur away, less where the window ends before. Raises FrugalError for
    another blend.
    """
    if blend not in BLENDS:
        raise FrugalError(
            f"the blend is '{blend}'", f"'{INSIDE}' or '{BOTH}'", "choose one of these"
        )
    window, inner = place.window, place.inner
    part = mask[window.rows, window.columns].float()
    sigma = float(blur)
    if blend == BOTH:
        scale = min(inner.height / window.height, inner.width / window.width)
        # Resampling there and back carries the edge on by two px of each grid at most.
        room = scale * (geometry.room_around(geometry.mask_box(mask), place) - 2) - 2
        sigma = min(sigma, max(0.0, room) / 3)
    if sigma <= 0:
        return part
    small = _coverage(part, inner.height, inner.width)
    soft = _softened(small, place, sigma)
    if blend == INSIDE:
        soft = (2 * soft - 1).clamp(min=0)
        while soft.max() < REACHED and sigma >= 0.5:
            sigma /= 2
            soft = (2 * _softened(small, place, sigma) - 1).clamp(min=0)
        if soft.max() < REACHED:
            return part
    soft = _coverage(soft, window.height, window.width)
    return soft * part if blend == INSIDE else soft


def _coverage(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, antialiased, not cut; [H, W] -> [height, width]."""
    if mask.shape == (height, width):
        return mask
    return F.interpolate(mask[None, None], size=(height, width), mode="bilinear", antialias=True)[
        0, 0
    ].clamp(0, 1)


def _softened(mask: torch.Tensor, place: Placement, sigma: float) -> torch.Tensor:
    """`pictures.blur_mask` of the window at canvas size. Beyond the window there is no mask, but
    where the photo ends it goes on.
    """
    (H, W), window, pad = place.photo, place.window, int(-(-3 * sigma // 1))
    sides = {
        "left": window.left > 0,
        "right": window.left + window.width < W,
        "top": window.top > 0,
        "bottom": window.top + window.height < H,
    }
    left, right, top, bottom = (pad * inside for inside in sides.values())
    soft = pictures.blur_mask(F.pad(mask, (left, right, top, bottom))[None], sigma)[0]
    return soft[top : top + mask.shape[0], left : left + mask.shape[1]]
