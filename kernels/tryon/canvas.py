"""Photo to canvas and back: what the try-on model sees, and its answer laid into the untouched
photo.

Canvas size is (H, W) in pixels. Pictures are float [B, H, W, 3] in 0..1, masks [B, H, W] of 0 and
1, 1 = repaint. Masking by mid grey and the composite after decoding follow CatVTON (arXiv
2407.15886).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import FrugalError
from . import blending, geometry, pictures, seam
from .blending import INSIDE
from .geometry import Placement

CROP, LETTERBOX = "crop around mask", "letterbox"


@dataclass(frozen=True)
class Frame:
    """What `stitch` needs: photos and binary masks at photo size, one placement per picture."""

    photo: torch.Tensor
    mask: torch.Tensor
    placements: tuple[Placement, ...]

    @property
    def canvas(self) -> tuple[int, int]:
        return self.placements[0].canvas


@dataclass(frozen=True)
class Canvas:
    """Person [B, H, W, 3], garment [B, H, W, 3] and mask [B, H, W] at canvas size, and the way
    back.
    """

    person: torch.Tensor
    garment: torch.Tensor
    mask: torch.Tensor
    frame: Frame


def prepare(
    person: torch.Tensor,
    garment: torch.Tensor,
    mask: torch.Tensor,
    size: tuple[int, int],
    fit: str = CROP,
    context: int = 25,
    threshold: float = 0.5,
    garment_mask: torch.Tensor | None = None,
) -> Canvas:
    """Lay person, garment and mask on canvases of `size` (H, W).

    fit: "crop around mask" (see `geometry.crop_around`; `context` in percent) or "letterbox". The
    garment is always letterboxed on white, which also shows where `garment_mask` [B, H, W], the
    transparency that Load Image gives beside a picture, is 1; padding of the person continues its
    border pixels and is never repainted. Raises FrugalError for unusable pictures, an empty mask,
    or batches that do not match.
    """
    person = pictures.as_rgb(person, "person")
    garment = pictures.on_white(garment, garment_mask, "garment")
    B = pictures.common_batch(person=person.shape[0], garment=garment.shape[0], mask=_count(mask))
    shown, masks, frame = place_person(person, mask, size, fit, context, threshold)
    frame = Frame(
        frame.photo.expand(B, -1, -1, -1),
        frame.mask.expand(B, -1, -1),
        frame.placements * (B // len(frame.placements)),
    )
    return Canvas(
        shown.expand(B, -1, -1, -1),
        on_white(garment, size).expand(B, -1, -1, -1),
        masks.expand(B, -1, -1),
        frame,
    )


def place_person(
    person: torch.Tensor,
    mask: torch.Tensor,
    size: tuple[int, int],
    fit: str,
    context: int,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, Frame]:
    """(person [B, H, W, 3], mask [B, H, W], frame) on canvases of `size`: `prepare` without a
    garment, with the same errors. B is that of person and mask.
    """
    person = pictures.as_rgb(person, "person")
    photo = (person.shape[1], person.shape[2])
    mask = pictures.as_mask(mask, photo, threshold).to(person.device)
    views = pictures.common_batch(person=person.shape[0], mask=mask.shape[0])
    person, mask = person.expand(views, -1, -1, -1), mask.expand(views, -1, -1)
    placements = tuple(_place(mask[i], photo, size, fit, context) for i in range(views))
    persons = torch.cat([_show(person[i : i + 1], p) for i, p in enumerate(placements)])
    masks = torch.cat([_show_mask(mask[i : i + 1], p) for i, p in enumerate(placements)])
    if (masks.sum(dim=(1, 2)) == 0).any():
        raise FrugalError(
            f"the mask vanishes on the canvas of {size[1]} x {size[0]} px",
            "a mask at least one canvas pixel wide",
            "use 'crop around mask' or paint a larger mask",
        )
    return persons, masks, Frame(person, mask, placements)


def _count(mask: torch.Tensor) -> int:
    return mask.shape[0] if mask.ndim > 2 else 1


def on_white(garment: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The whole garment picture on a white canvas."""
    box = geometry.letterbox((garment.shape[1], garment.shape[2]), size).inner
    canvas = torch.ones((garment.shape[0], *size, 3), dtype=torch.float32, device=garment.device)
    canvas[:, box.rows, box.columns] = pictures.resize_picture(garment, box.height, box.width)
    return canvas


def grey_out(person: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The person with mid grey (0.5, which a VAE encodes as 0.0) where the mask is 0.5 or more."""
    keep = (mask.to(person.device) < 0.5)[..., None]
    return torch.where(keep, person, torch.full_like(person, 0.5))


def stitch(
    result: torch.Tensor,
    frame: Frame,
    blur: float,
    color_match: bool = False,
    blend: str = INSIDE,
) -> torch.Tensor:
    """Lay decoded canvases [B, H, W, 3] into the photos: [B, photo H, photo W, 3].

    blur, blend: width in canvas pixels and side of the soft edge, see `blending.weights`. Where the
    weight is 0, which with "inside the mask" is all that the mask leaves out, the photo's own
    values come back, bit for bit. color_match: first match the canvas's colours to the photo's
    around the mask, see `seam.match`. Raises FrugalError when result and frame do not belong
    together.
    """
    if result.ndim != 4 or tuple(result.shape[1:3]) != frame.canvas or result.shape[-1] < 3:
        raise FrugalError(
            f"the decoded picture has the shape {tuple(result.shape)}",
            f"[batch, {frame.canvas[0]}, {frame.canvas[1]}, 3] as prepared",
            "connect the frame of the same preparation",
        )
    B = pictures.common_batch(result=result.shape[0], frame=len(frame.placements))
    placements = frame.placements * (B // len(frame.placements))
    out = frame.photo.expand(B, -1, -1, -1).clone()
    masks = frame.mask.expand(B, -1, -1)
    for i, place in enumerate(placements):
        one = result[min(i, result.shape[0] - 1), place.inner.rows, place.inner.columns, :3]
        window, rows, columns = place.window, place.window.rows, place.window.columns
        if color_match:
            inner = (place.inner.height, place.inner.width)
            seen = pictures.resize_picture(out[i : i + 1, rows, columns], *inner)[0]
            covered = pictures.resize_mask(masks[i : i + 1, rows, columns], *inner)[0]
            one = seam.match(one, seen.to(one.device), covered.to(one.device))
        new = pictures.resize_picture(one[None], window.height, window.width)[0]
        new = new.to(device=out.device, dtype=out.dtype)
        alpha = blending.weights(masks[i], place, blur, blend)[..., None]
        alpha = alpha.to(device=out.device, dtype=out.dtype)
        old = out[i, rows, columns]
        out[i, rows, columns] = torch.where(alpha > 0, old + alpha * (new - old), old)
    return out


def _place(mask, photo, size, fit, context) -> Placement:
    box = geometry.mask_box(mask)
    if fit == LETTERBOX:
        return geometry.letterbox(photo, size)
    if fit != CROP:
        raise FrugalError(
            f"the fit is '{fit}'", f"'{CROP}' or '{LETTERBOX}'", "choose one of these"
        )
    return geometry.crop_around(box, photo, size, context)


def _margins(place: Placement) -> tuple[int, int, int, int]:
    """Padding of the canvas as (left, right, top, bottom)."""
    (H, W), box = place.canvas, place.inner
    return box.left, W - box.left - box.width, box.top, H - box.top - box.height


def _show(person: torch.Tensor, place: Placement) -> torch.Tensor:
    view = person[:, place.window.rows, place.window.columns].float()
    view = pictures.resize_picture(view, place.inner.height, place.inner.width)
    return F.pad(view.movedim(-1, 1), _margins(place), "replicate").movedim(1, -1)


def _show_mask(mask: torch.Tensor, place: Placement) -> torch.Tensor:
    view = mask[:, place.window.rows, place.window.columns]
    view = pictures.resize_mask(view, place.inner.height, place.inner.width)
    return F.pad(view, _margins(place))
