"""Checks and resampling of pictures and masks in ComfyUI's layout.

A picture is float [B, H, W, C] in 0..1, a mask float [B, H, W] in 0..1. Resampling is torch's
bicubic (pictures) and bilinear (masks) interpolation with antialiasing, half-pixel centres; equal
sizes pass through untouched.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..errors import FrugalError

SMALLEST_SIDE = 16  # px; below that there is no picture to work on


def as_rgb(picture: torch.Tensor, name: str) -> torch.Tensor:
    """[B, H, W, 3] of a grey, grey + alpha, RGB or RGBA picture, what is transparent laid on white;
    `name` is for the message.

    Opaque pixels keep their bits. Raises FrugalError for another layout or a side below 16 px.
    """
    if picture.ndim != 4 or picture.shape[-1] not in (1, 2, 3, 4):
        raise FrugalError(
            f"the {name} has the shape {tuple(picture.shape)}",
            "IMAGE [batch, height, width, 1 to 4 channels]",
            "connect an image",
        )
    _check_side(picture, name)
    channels = picture.shape[-1]
    colour = picture[..., : 3 if channels >= 3 else 1].expand(*picture.shape[:3], 3)
    return _over_white(colour, picture[..., -1:]) if channels in (2, 4) else colour


def on_white(picture: torch.Tensor, transparent: torch.Tensor | None, name: str) -> torch.Tensor:
    """`as_rgb` of a picture whose transparency comes beside it, as from ComfyUI's Load Image: mask
    [B, H, W], 1 = transparent. None, or a mask without anything, is an opaque picture.
    """
    colour = as_rgb(picture, name)
    if transparent is None or not (transparent > 0).any():
        return colour
    mask = as_frames(transparent)
    if mask.shape[1:] != colour.shape[1:3]:
        raise FrugalError(
            f"the mask of the {name} has {mask.shape[2]} x {mask.shape[1]} px and the {name} "
            f"{colour.shape[2]} x {colour.shape[1]} px",
            "one size",
            "take both from the same Load Image node",
        )
    count = common_batch(**{name: len(colour), f"{name} mask": len(mask)})
    opaque = 1 - torch.nan_to_num(mask).to(colour.device, colour.dtype)[..., None]
    return _over_white(colour.expand(count, -1, -1, -1), opaque)


def _over_white(colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    alpha = alpha.clamp(0, 1)
    return colour * alpha + (1 - alpha)


def as_frames(mask: torch.Tensor) -> torch.Tensor:
    """[B, H, W] of a mask [H, W], [B, H, W] or [B, 1, H, W]; raises FrugalError for another."""
    if mask.ndim == 2:
        return mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        return mask[:, 0]
    if mask.ndim != 3:
        raise FrugalError(
            f"the mask has the shape {tuple(mask.shape)}",
            "MASK [batch, height, width]",
            "connect a mask",
        )
    return mask


PAINT = (
    "paint over the clothes to replace: right-click the person's Load Image node, 'Open in "
    "MaskEditor', and connect the mask of that node"
)


def as_mask(mask: torch.Tensor, size: tuple[int, int], threshold: float) -> torch.Tensor:
    """Binary mask [B, H, W] of the photo's size (H, W); 1 = repaint, where the value >= threshold.

    A mask of another size but the same aspect within 1 % is resized to the nearest pixel. Raises
    FrugalError for any other, and where a mask of the batch has nothing to repaint.
    """
    mask = as_frames(mask)
    inside = mask >= threshold
    if mask.numel() and not inside.flatten(1).any(dim=1).all():
        values = torch.nan_to_num(mask)
        raise FrugalError(
            f"the mask of {mask.shape[2]} x {mask.shape[1]} px has no value of {threshold:g} or "
            f"more, its largest is {float(values.amax(dim=(1, 2)).min()):.3g}",
            "1 where to repaint",
            PAINT if not (values > 0).any() else "paint the mask fully, or lower mask_threshold",
        )
    H, W = size
    h, w = inside.shape[1:]
    inside = inside.to(torch.float32)
    if (h, w) == (H, W):
        return inside
    if abs(w * H - h * W) > 0.01 * h * W:
        raise FrugalError(
            f"the mask has {w} x {h} px and the photo {W} x {H} px",
            "the same size, or the same aspect within 1 %",
            "make the mask from this photo",
        )
    return F.interpolate(inside[:, None], size=(H, W), mode="nearest-exact")[:, 0]


def common_batch(**batches: int) -> int:
    """The batch size of inputs by name: one picture serves all, else the numbers must be equal."""
    sizes = {size for size in batches.values() if size != 1}
    if len(sizes) > 1 or 0 in sizes:
        raise FrugalError(
            f"the batches are {', '.join(f'{name} {size}' for name, size in batches.items())}",
            "equal numbers, or 1 for all",
            "repeat or cut the shorter batch",
        )
    return sizes.pop() if sizes else 1


def resize_picture(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic, antialiased, clamped to 0..1; [B, H, W, C] -> [B, height, width, C], float32."""
    if picture.shape[1:3] == (height, width):
        return picture
    moved = F.interpolate(
        picture.movedim(-1, 1).float(), size=(height, width), mode="bicubic", antialias=True
    )
    return moved.clamp(0, 1).movedim(1, -1)


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Coverage by antialiased bilinear resampling, cut at one half; [B, H, W] -> [B, height,
    width].
    """
    if mask.shape[1:] == (height, width):
        return mask
    moved = F.interpolate(mask[:, None], size=(height, width), mode="bilinear", antialias=True)
    return (moved[:, 0] >= 0.5).to(mask.dtype)


def blur_mask(mask: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of standard deviation `sigma` px, cut at 3 sigma, borders continued; [B, H, W].

    Exactly 0 further than ceil(3 sigma) px from the mask, along rows and columns.
    """
    if sigma <= 0:
        return mask
    radius = int(-(-3 * sigma // 1))
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=mask.device)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    moved = mask[:, None].float()
    moved = F.conv2d(F.pad(moved, (radius, radius, 0, 0), "replicate"), kernel[None, None, None, :])
    moved = F.conv2d(F.pad(moved, (0, 0, radius, radius), "replicate"), kernel[None, None, :, None])
    return moved[:, 0].clamp(0, 1)


def _check_side(picture: torch.Tensor, name: str) -> None:
    h, w = picture.shape[1:3]
    if min(h, w) < SMALLEST_SIDE:
        raise FrugalError(
            f"the {name} has {w} x {h} px",
            f"at least {SMALLEST_SIDE} px a side",
            "connect a real picture",
        )
