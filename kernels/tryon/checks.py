"""What a person should hear about a mask or a garment that can be used but looks like a slip."""

from __future__ import annotations

import torch

from . import pictures
from .canvas import Frame

GREY = 0.5  # share of what a mask covers that is neither black nor white in a grey picture
BORDER = 0.9  # share of the photo's border that an inverted mask covers
BLACK = 0.5  # share of the border that is pure black where a transparent file lost its alpha


def mask_notes(mask: torch.Tensor, frame: Frame) -> list[str]:
    """Notes on a MASK as it came in and on the `Frame` made of it, about the first that has one."""
    notes = []
    values = pictures.as_frames(mask)
    seen, full = ((values > level).float().mean(dim=(1, 2)) for level in (0.1, 0.9))
    grey = (seen - full) / seen.clamp(min=1e-9)
    if grey.numel() and float(grey.max()) > GREY:
        notes.append(
            f"{100 * float(grey.max()):.0f} % of what the mask covers is grey, neither repainted "
            "nor kept; a mask is 1 on the clothes and 0 elsewhere"
        )
    edges = [frame.mask[:, 0], frame.mask[:, -1], frame.mask[:, :, 0], frame.mask[:, :, -1]]
    border, share = torch.cat(edges, dim=1).mean(dim=1), frame.mask.mean(dim=(1, 2))
    inverted = (border > BORDER) & (share < 1)
    if inverted.any():
        worst = float(share[inverted].max())
        notes.append(
            f"the mask repaints {100 * worst:.0f} % of the photo, nearly all of its border too; if "
            "it is inverted, put Invert Mask before"
        )
    for one, place in zip(frame.mask, frame.placements, strict=True):
        within = one[place.window.rows, place.window.columns]
        if left_out := int(one.sum() - within.sum()):
            notes.append(
                f"{left_out} px of the mask are specks outside the window and stay as they are"
            )
            break
    return notes


def garment_notes(garment: torch.Tensor) -> list[str]:
    """A note on a garment [B, H, W, 3] that stands on pure black."""
    edges = [garment[:, 0], garment[:, -1], garment[:, :, 0], garment[:, :, -1]]
    black = (torch.cat(edges, dim=1) == 0).all(dim=-1).float().mean(dim=1)
    if not black.numel() or float(black.max()) <= BLACK:
        return []
    return [
        "the garment stands on pure black; if its file is transparent, connect the mask of its "
        "Load Image node as garment_mask"
    ]
