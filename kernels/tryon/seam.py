"""Colours of a painted canvas matched to the photo where both show the same thing.

The VAE shifts colours a little everywhere. Outside the mask canvas and photo show the same scene,
so a ring there tells the shift; mean and standard deviation per channel are carried over as in
Reinhard et al., Color Transfer between Images (2001), here in RGB and from a ring.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..errors import FrugalError

RING = 16  # share of the shorter side that the ring is wide: 1 / 16
FEWEST = 64  # pixels of a ring that mean and deviation can be taken from
FLAT = 1 / 255  # deviation under which there is no contrast to match
STRONGEST = 2.0  # contrast is changed by this factor at most


def ring(mask: torch.Tensor) -> torch.Tensor:
    """Bool [H, W]: pixels at most a sixteenth of the shorter side from the mask [H, W] of 0 and 1,
    along rows and columns, and not in it.
    """
    reach = max(1, min(mask.shape) // RING)
    inside = mask.float()[None, None]
    grown = F.max_pool2d(inside, 2 * reach + 1, stride=1, padding=reach)
    return ((grown > 0) & (inside == 0))[0, 0]


def match(painted: torch.Tensor, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`painted` [H, W, 3] in 0..1 with the colours it has in the ring around the mask shifted and
    scaled to those of `photo` [H, W, 3] there.

    Raises FrugalError when fewer than 64 pixels around the mask are known.
    """
    where = ring(mask)
    if int(where.sum()) < FEWEST:
        raise FrugalError(
            f"the mask leaves {int(where.sum())} px around it on the canvas",
            f"at least {FEWEST} px to compare colours",
            "turn color_match off, or leave more room around the mask",
        )
    have, want = painted[where].float(), photo[where].float()
    spread = have.std(dim=0)
    gain = (want.std(dim=0) / spread.clamp(min=FLAT)).clamp(1 / STRONGEST, STRONGEST)
    gain = torch.where(spread < FLAT, torch.ones_like(gain), gain)
    shifted = (painted.float() - have.mean(dim=0)) * gain + want.mean(dim=0)
    return shifted.clamp(0, 1).to(painted.dtype)
