"""The cloth-agnostic mask of CatVTON: what to repaint so that no trace of the old garment is left.

Written from the rules of its `cloth_masker` (CatVTON, arXiv 2407.15886): sets of labels of three
maps (DensePose, LIP, ATR), two dilations, convex hulls, a blur and a threshold. Lengths follow the
longest side L in px: d = odd(L // 250) is the side of the square that dilates, k = odd(L // 25) the
width of the blur, with sigma = 0.3 ((k - 1) / 2 - 1) + 0.8; odd(n) is n or n + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import FrugalError
from . import dispatch
from .labels import ATR, DENSEPOSE, LIP
from .pool import Progress

PARTS = ("upper", "lower", "overall", "inner", "outer")
HULLS = ("per_region", "closing", "off")
MAX_DILATE, MAX_BLUR = 255, 511
# The blur's result is kept from 25 of 255 on; half a level lower on exact values.
KEEP = 24.5 / 255
EXTREMITY, LIMB, FACE, WEAK, CLOTHES, PERSON, DENSE = (1 << n for n in range(7))

_ARMS, _LEGS = ("Left-arm", "Right-arm"), ("Left-leg", "Right-leg")
_ALWAYS = (
    "Hair", "Hat", "Glove", "Sunglasses", "Bag", "Left-shoe", "Right-shoe", "Scarf", "Socks",
)  # fmt: skip
_TORSO = ("Torso",)
_ARM_PARTS = ("Left-upper-arm", "Right-upper-arm", "Left-forearm", "Right-forearm")
_LEG_PARTS = ("Left-thigh", "Right-thigh", "Left-calf", "Right-calf")
_ENDS = ("Right-hand", "Left-hand", "Right-foot", "Left-foot")
# part: protected body, protected clothes in LIP and in ATR, garments to replace, DensePose parts
_RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "upper": (
        _LEGS, ("Skirt", "Pants"), ("Skirt", "Pants"),
        ("Upper-clothes", "Coat", "Dress", "Jumpsuits"), _TORSO + _ARM_PARTS,
    ),
    "lower": (
        (*_ARMS, "Face"), ("Upper-clothes", "Coat"), ("Upper-clothes",),
        ("Pants", "Skirt", "Dress", "Jumpsuits"), _LEG_PARTS,
    ),
    "overall": (
        (), (), (), ("Upper-clothes", "Dress", "Pants", "Skirt", "Coat", "Jumpsuits"),
        _TORSO + _ARM_PARTS + _LEG_PARTS,
    ),
    "inner": (
        _LEGS, ("Dress", "Coat", "Skirt", "Pants", "Jumpsuits"),
        ("Dress", "Coat", "Skirt", "Pants"), ("Upper-clothes",), _TORSO,
    ),
    "outer": (
        _LEGS, ("Upper-clothes", "Dress", "Pants", "Skirt", "Jumpsuits"),
        ("Dress", "Pants", "Skirt"), ("Coat",), _TORSO + _ARM_PARTS,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AgnosticSettings:
    """part: which garment goes; see `PARTS`. hull: "per_region" as CatVTON, "closing" (a disk of
    `radius` px), which leaves the gap between arm and body open, or "off". dilate: side d of the
    square in px, blur: width k of the blur in px, both odd; 0 takes the rule of the module.
    """

    part: str = "upper"
    hull: str = "per_region"
    radius: int = 16
    dilate: int = 0
    blur: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (("part", self.part, PARTS), ("hull", self.hull, HULLS)):
            if value not in allowed:
                raise FrugalError(
                    f"{name} {value!r}", f"one of {', '.join(allowed)}", f"choose another {name}"
                )
        for name, value, high in (
            ("dilate", self.dilate, MAX_DILATE),
            ("blur", self.blur, MAX_BLUR),
        ):
            if value and not (value % 2 and 0 < value <= high):
                raise FrugalError(
                    f"{name} {value} px", f"an odd number up to {high}, or 0", f"change {name}"
                )
        if not 1 <= self.radius <= 512:
            raise FrugalError(f"radius {self.radius} px", "1 to 512 px", "change radius")

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """d and k in px for a picture of this size."""
        longest = max(height, width)
        return self.dilate or longest // 250 | 1, self.blur or longest // 25 | 1


def integer_taps(k: int) -> tuple[np.ndarray, int]:
    """Gaussian of width k px (odd) in integers, and the squared scale's value from which a pixel is
    kept.

    uint32 [r + 2] with r = (k - 1) / 2: the centre, one side, and a 0; together with the other
    side they sum to 2^15, so that sums over both axes are exact in 32 bits.
    """
    side = np.arange((k + 1) // 2)
    sigma = 0.3 * ((k - 1) / 2 - 1) + 0.8
    weight = np.exp(-0.5 * (side / sigma) ** 2)
    taps = np.zeros(len(side) + 1, np.uint32)
    taps[1:-1] = np.rint(weight[1:] * 2**15 / (2 * weight.sum() - weight[0]))
    taps[0] = 2**15 - 2 * taps[1:].sum()
    return taps, int(np.ceil(KEEP * 2.0**30))


def mirrored(size: int, r: int) -> np.ndarray:
    """Indices -r..size + r - 1 reflected into 0..size - 1, the border itself not repeated."""
    if size == 1:
        return np.zeros(1 + 2 * r, np.int64)
    folded = np.abs(np.arange(-r, size + r)) % (2 * (size - 1))
    return np.minimum(folded, 2 * (size - 1) - folded)


def tables(part: str, with_lip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Set bits of every label, uint8 [256] for DensePose, LIP and ATR.

    The face comes from LIP alone; without LIP (`with_lip` false) from ATR.
    """
    body, clothes_lip, clothes_atr, target, dense_parts = _RULES[part]

    def table(names: tuple[str, ...], *sets: tuple[int, tuple[str, ...]]) -> np.ndarray:
        out = np.zeros(256, np.uint8)
        for bit, members in sets:
            out[[n for n, name in enumerate(names) if name in members]] |= np.uint8(bit)
        return out

    dense = table(DENSEPOSE, (EXTREMITY, _ENDS), (DENSE, dense_parts))
    limbs, weak = (LIMB, _ARMS + _LEGS), _ALWAYS + body
    lip = table(LIP, limbs, (FACE, ("Face",)), (WEAK, weak + clothes_lip), (CLOTHES, target))
    face = () if with_lip else ("Face",)
    atr = table(ATR, limbs, (FACE, face), (WEAK, weak + clothes_atr), (CLOTHES, target))
    lip[1:] |= np.uint8(PERSON)
    atr[1:] |= np.uint8(PERSON)
    return dense, lip, atr


def coat_note(part: str, with_lip: bool) -> str | None:
    """What a person should know who asks for a part that the given maps cannot tell apart: only LIP
    has a class for coats, ATR calls them Upper-clothes.
    """
    if part not in ("inner", "outer") or with_lip:
        return None
    known = "a coat counts as the upper garment"
    then = {"outer": "'outer' repaints what 'upper' repaints",
            "inner": "'inner' repaints the coat with what is under it"}  # fmt: skip
    return f"an ATR map has no class for coats: {known}, and {then[part]}; connect a LIP map"


def agnostic_mask(
    densepose: np.ndarray | None,
    lip: np.ndarray | None,
    atr: np.ndarray | None,
    settings: AgnosticSettings,
    progress: Progress | None = None,
    threads: int | None = None,
    use_numba: bool | None = None,
) -> np.ndarray:
    """Mask of what to repaint, float32 [B, H, W] of 0 and 1.

    densepose, lip, atr: label maps uint8 [B, H, W] of one size; at least one of LIP and ATR.
    Without DensePose the mask starts from the parsed person alone, and hands and feet are not
    protected. progress, threads: as of `refine.refine`. Raises FrugalError for maps that are
    missing or differ in shape.
    """
    given = {"DensePose": densepose, "LIP": lip, "ATR": atr}
    maps = {name: labels for name, labels in given.items() if labels is not None}
    if lip is None and atr is None:
        raise FrugalError(
            "no parsing map", "a LIP or an ATR label map", "connect a human parser's output"
        )
    shapes = {labels.shape for labels in maps.values()}
    for name, labels in maps.items():
        if labels.dtype != np.uint8 or labels.ndim != 3 or 0 in labels.shape[1:] or len(shapes) > 1:
            raise FrugalError(
                f"a {name} map of {labels.dtype} {list(labels.shape)}",
                "label maps uint8 [frames, height, width] of one shape",
                "resize the maps to one size with nearest",
            )
    shape = next(iter(shapes))
    none = np.zeros((1, *shape[1:]), np.uint8)
    dense, first, second = (none if m is None else np.ascontiguousarray(m) for m in given.values())
    return dispatch.run_agnostic(
        (dense, first, second), tables(settings.part, lip is not None), settings, shape, progress,
        threads, use_numba,
    )  # fmt: skip
