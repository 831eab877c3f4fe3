"""Where a photo lies on the try-on canvas: integers only, so that the way back is exact.

A `Placement` says which window of the photo is shown and which box of the canvas shows it. Boxes
are (top, left, height, width) in pixels. What of the canvas is not in the box is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import FrugalError
from ..masks.refine import boxes


@dataclass(frozen=True)
class Box:
    """A rectangle of whole pixels; `height` and `width` are at least 1."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Placement:
    """`window` of a photo of size `photo` (H, W), shown in `inner` of a canvas of size `canvas`."""

    photo: tuple[int, int]
    window: Box
    canvas: tuple[int, int]
    inner: Box


def mask_box(mask: torch.Tensor) -> Box:
    """Box of a mask [H, W] by the rule of every box, see `masks.refine.boxes`: specks beside a
    large region do not count. Raises FrugalError when there is nothing.
    """
    left, top, width, height = map(int, boxes(mask.float().cpu().numpy())[0])
    if not width:
        raise FrugalError(
            f"the mask of {mask.shape[1]} x {mask.shape[0]} px is empty",
            "painted pixels where the garment goes",
            "paint the mask, or lower mask_threshold",
        )
    return Box(top, left, height, width)


def fit_inside(size: tuple[int, int], canvas: tuple[int, int]) -> Box:
    """Largest centred box of the shape of `size` (H, W) in the canvas; halves and offsets go down.

    A shape within one pixel of the canvas's own fills it.
    """
    (h, w), (H, W) = size, canvas
    if abs(w * H - h * W) <= max(H, W, h, w):
        return Box(0, 0, H, W)
    if w * H > h * W:
        height, width = max(1, (h * W + w // 2) // w), W
    else:
        height, width = H, max(1, (w * H + h // 2) // h)
    return Box((H - height) // 2, (W - width) // 2, height, width)


def letterbox(photo: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """The whole photo on the canvas."""
    return Placement(photo, Box(0, 0, *photo), canvas, fit_inside(photo, canvas))


def crop_around(
    mask: Box, photo: tuple[int, int], canvas: tuple[int, int], context: int
) -> Placement:
    """A window of the canvas's shape around the mask's box, inside the photo.

    context: percent of the box's own side added on each of its four sides (rounded up). The window
    is then widened to the canvas's shape, moved inside the photo, and made smaller when the photo
    has no room for that much context. Only where the mask's box itself is in no window of the
    canvas's shape that fits the photo does the window take another shape, and the canvas padding.
    """
    (H, W), (h, w) = photo, canvas
    height = mask.height + 2 * _up(mask.height * context, 100)
    width = mask.width + 2 * _up(mask.width * context, 100)
    if width * h < height * w:
        width = _up(height * w, h)
    else:
        height = _up(width * h, w)
    roomy_h, roomy_w = (H, max(1, H * w // h)) if H * w <= W * h else (max(1, W * h // w), W)
    if (height > roomy_h or width > roomy_w) and (mask.height <= roomy_h and mask.width <= roomy_w):
        height, width = roomy_h, roomy_w
    height, width = min(height, H), min(width, W)
    window = Box(
        _centred(mask.top, mask.height, height, H),
        _centred(mask.left, mask.width, width, W),
        height,
        width,
    )
    return Placement(photo, window, canvas, fit_inside((height, width), canvas))


def room_around(mask: Box, placement: Placement) -> int:
    """Pixels between the mask's box and the nearest window side that is not a side of the photo."""
    window, (H, W) = placement.window, placement.photo
    bottom, right = window.top + window.height, window.left + window.width
    gaps = [H + W]
    gaps += [mask.top - window.top] if window.top > 0 else []
    gaps += [mask.left - window.left] if window.left > 0 else []
    gaps += [bottom - mask.top - mask.height] if bottom < H else []
    gaps += [right - mask.left - mask.width] if right < W else []
    return max(0, min(gaps))


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _centred(start: int, length: int, size: int, limit: int) -> int:
    """First pixel of a stretch of `size` centred on [start, start + length), moved inside [0,
    limit).
    """
    return min(max(0, start + (length - size) // 2), limit - size)
