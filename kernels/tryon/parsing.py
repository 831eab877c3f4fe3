"""Human parsers' label numbers, brought into the order that mask nodes know.

A parser's config.json names its labels. Their names, not their numbers, say what they are: two
files with the same classes may number them differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import FrugalError
from ..masks.labels import ATR, DENSEPOSE, LIP

PLAIN = "numbers"
# The FASHN classes: name, the ATR label that stands for it, and the DensePose part or Background.
# Its sides are not told apart, so left stands for both. Jewelry is kept, as a bag is. A hand is
# part of an arm in ATR, and bare torso is where an upper garment goes.
FASHN = {
    "background": ("Background", "Background"),
    "face": ("Face", "Face"),
    "hair": ("Hair", "Background"),
    "top": ("Upper-clothes", "Background"),
    "dress": ("Dress", "Background"),
    "skirt": ("Skirt", "Background"),
    "pants": ("Pants", "Background"),
    "belt": ("Belt", "Background"),
    "bag": ("Bag", "Background"),
    "hat": ("Hat", "Background"),
    "scarf": ("Scarf", "Background"),
    "glasses": ("Sunglasses", "Background"),
    "arms": ("Left-arm", "Left-upper-arm"),
    "hands": ("Left-arm", "Left-hand"),
    "legs": ("Left-leg", "Left-calf"),
    "feet": ("Left-shoe", "Left-foot"),
    "torso": ("Upper-clothes", "Torso"),
    "jewelry": ("Bag", "Background"),
}


@dataclass(frozen=True)
class LabelOrder:
    """How to read a parser's numbers. map: "ATR", "LIP", or "numbers" for names nobody knows.

    labels: number -> label of the map. body: number -> DensePose label, empty if the parser does
    not tell hands, feet and skin apart.
    """

    map: str
    labels: tuple[int, ...]
    body: tuple[int, ...] = ()


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def label_order(names: Mapping[int, str]) -> LabelOrder:
    """The order of a parser with these label names by number.

    ATR, LIP and FASHN are told by their full set of names (any case; space or _ for -). Raises
    FrugalError unless the numbers are 0, 1, ... without a gap and at most 256.
    """
    count = len(names)
    if sorted(names) != list(range(count)) or not 2 <= count <= 256:
        raise FrugalError(
            f"the parser numbers its {count} labels {sorted(names)[:4]}...",
            "2 to 256 labels numbered from 0 without a gap",
            "use a segmentation model with a complete id2label in its config.json",
        )
    plain = [_plain(names[number]) for number in range(count)]
    for name, known in (("ATR", ATR), ("LIP", LIP)):
        place = {_plain(label): number for number, label in enumerate(known)}
        if sorted(plain) == sorted(place):
            return LabelOrder(name, tuple(place[label] for label in plain))
    if sorted(plain) == sorted(FASHN):
        return LabelOrder(
            "ATR",
            tuple(ATR.index(FASHN[label][0]) for label in plain),
            tuple(DENSEPOSE.index(FASHN[label][1]) for label in plain),
        )
    return LabelOrder(PLAIN, tuple(range(count)))


def renumber(labels: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    """uint8 labels [...] through a table number -> label, uint8; each number has to be in it."""
    full = torch.zeros(256, dtype=torch.uint8)
    full[: len(table)] = torch.tensor(table, dtype=torch.uint8)
    return torch.from_numpy(full.numpy()[labels.cpu().numpy()])


@dataclass(frozen=True)
class Preprocess:
    """What a parser expects: `size` (H, W) px, and per channel the mean and standard deviation of
    values in 0..1.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, config: Mapping) -> Preprocess:
        """From a preprocessor_config.json of an image processor; absent values are Segformer's own
        defaults (512 x 512, the mean and deviation of ImageNet).
        """
        size = config.get("size", 512)
        if isinstance(size, Mapping):
            if "height" not in size or "width" not in size:
                raise FrugalError(
                    f"the preprocessor's size is {dict(size)}",
                    "a height and a width",
                    "use the parser's own preprocessor_config.json",
                )
            size = (size["height"], size["width"])
        else:
            size = (size, size) if isinstance(size, int) else tuple(size)
        mean = tuple(config.get("image_mean", (0.485, 0.456, 0.406)))
        return cls(size, mean, tuple(config.get("image_std", (0.229, 0.224, 0.225))))

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] in 0..1 -> [B, 3, *size] normalised, bilinear with antialiasing."""
        moved = picture.movedim(-1, 1).float()
        if tuple(moved.shape[2:]) != self.size:
            moved = F.interpolate(moved, size=self.size, mode="bilinear", antialias=True)
        mean, std = (moved.new_tensor(v)[None, :, None, None] for v in (self.mean, self.std))
        return (moved - mean) / std


def labels_of(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Class of the largest logit, uint8 [B, *size], after bilinear interpolation of the logits
    [B, classes, h, w] to `size` (H, W); the first of equal ones.

    One class at a time, so that a photo of 12 megapixels takes two float maps and not 18 or 20.
    """
    best, found = None, None
    for number in range(logits.shape[1]):
        one = logits[:, number : number + 1].float()
        one = F.interpolate(one, size=size, mode="bilinear", align_corners=False)[:, 0]
        if best is None or found is None:
            best, found = one, torch.zeros(one.shape, dtype=torch.uint8, device=one.device)
            continue
        found.masked_fill_(one > best, number)
        torch.maximum(best, one, out=best)
    if found is None:
        raise ValueError("logits without classes")
    return found


def as_picture(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, H, W] in 0..255 as grey levels, float32 [B, H, W, 3]."""
    return (labels.to(torch.float32) / 255)[..., None].expand(*labels.shape, 3).contiguous()
