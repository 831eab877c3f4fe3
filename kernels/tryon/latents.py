"""The joined latent of CatVTON: person above, garment below, twice the canvas's latent height; in
the mask-free model person left, garment right.

Latents are float [B, C, h, w] with h = H / factor, w = W / factor of the canvas (H, W); factor is
8 for SD 1.5. Stacking along the height and the nearest mask follow CatVTON (arXiv 2407.15886).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..errors import FrugalError


def check_canvas(
    person: tuple[int, int], garment: tuple[int, int], mask: tuple[int, ...], factor: int
) -> None:
    """Raise FrugalError unless person and garment (H, W) and mask (B, H, W) share a canvas."""
    if garment != person or mask[1:] != person:
        raise FrugalError(
            f"person {_text(person)}, garment {_text(garment)} and mask {_text(mask[1:])} differ",
            "three canvases of one size",
            "take all three from one 'Prepare Try-On' node",
        )
    check_size(person, factor)


def check_size(canvas: tuple[int, int], factor: int) -> None:
    """Raise FrugalError unless a canvas (H, W) is made of whole latent cells."""
    if canvas[0] % factor or canvas[1] % factor:
        raise FrugalError(
            f"the canvas has {_text(canvas)}",
            f"multiples of {factor} px",
            "change width and height",
        )


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Nearest sample of a mask [B, H, W] at latent size: [B, 1, H / factor, W / factor] of 0 and
    1.

    One cell takes its top left pixel, as torch's "nearest" does; a bilinear mask would differ from
    what the model was trained on.
    """
    size = (mask.shape[1] // factor, mask.shape[2] // factor)
    return F.interpolate((mask >= 0.5).float()[:, None], size=size, mode="nearest")


def stack(person: torch.Tensor, garment: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] twice -> [B, C, 2h, w], person above."""
    return torch.cat([person, garment], dim=2)


def beside(person: torch.Tensor, garment: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] twice -> [B, C, h, 2w], person left: the mask-free model's canvas."""
    return torch.cat([person, garment], dim=3)


def person_half(samples: torch.Tensor, size: tuple[int, int], factor: int) -> torch.Tensor:
    """The person's half of a joined latent, upper or left; raises FrugalError when it is neither
    twice as high nor twice as wide as the canvas (H, W).
    """
    h, w = size[0] // factor, size[1] // factor
    if samples.ndim == 4 and tuple(samples.shape[2:]) == (2 * h, w):
        return samples[:, :, :h]
    if samples.ndim == 4 and tuple(samples.shape[2:]) == (h, 2 * w):
        return samples[..., :w]
    raise FrugalError(
        f"the LATENT has the shape {tuple(samples.shape)}",
        f"[batch, 4, {2 * h}, {w}], person over garment for a canvas of {_text(size)}, or "
        f"[batch, 4, {h}, {2 * w}], beside it, of the mask-free model",
        "sample the LATENT of the 'Try-On Conditioning' node",
    )


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]} px" if len(size) == 2 else f"of shape {size}"
