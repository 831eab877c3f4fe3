"""What a refinement does: the settings, their limits, and the tables that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import FrugalError

SHAPES = ("disk", "diamond", "square")
FEATHERS = ("ramp_out", "ramp_in", "ramp_center", "gaussian")
TEMPORAL = ("off", "ema", "ema_both", "median3", "median5", "union")
MAX_RADIUS = 512
MAX_FEATHER = 255.0
MAX_REGIONS = 256


@dataclass(frozen=True)
class RefineSettings:
    """Steps in their fixed order; the defaults of all but `threshold` leave a mask as it is.

    temporal, temporal_strength: smoothing over frames, of "ema" the share of the previous frame,
    0 <= s < 1; "ema_both" runs it forwards and then backwards, so that edges do not lag.
    threshold: a pixel is inside where value > threshold; 0 keeps grey values.
    fill_holes: largest area in px of an enclosed hole to fill; 0 off, -1 any size.
    drop_islands: regions below this many px vanish; 0 off. keep_largest: number of regions that
    stay; 0 all.
    grow, grow_shape: radius in px, negative shrinks; see `SHAPES`.
    feather, feather_mode: ramp length in px (exact Euclidean distance) or, for "gaussian", its
    sigma in px.

    With threshold 0 a hole is an enclosed region below full and a region is what lies above empty,
    each by half an 8-bit step; distance ramps need a hard edge and are refused.
    """

    threshold: float = 0.5
    fill_holes: int = 0
    drop_islands: int = 0
    keep_largest: int = 0
    grow: int = 0
    grow_shape: str = "disk"
    feather: float = 0.0
    feather_mode: str = "ramp_out"
    temporal: str = "off"
    temporal_strength: float = 0.5

    SOFT_EMPTY: ClassVar[np.float32] = np.float32(0.5 / 255)
    SOFT_FULL: ClassVar[np.float32] = np.float32(1 - 0.5 / 255)

    def __post_init__(self) -> None:
        _choice("grow_shape", self.grow_shape, SHAPES)
        _choice("feather_mode", self.feather_mode, FEATHERS)
        _choice("temporal", self.temporal, TEMPORAL)
        _range("threshold", self.threshold, 0, 1, "")
        _range("fill_holes", self.fill_holes, -1, 2**31 - 1, " px")
        _range("drop_islands", self.drop_islands, 0, 2**31 - 1, " px")
        _range("keep_largest", self.keep_largest, 0, MAX_REGIONS, "")
        _range("grow", self.grow, -MAX_RADIUS, MAX_RADIUS, " px")
        _range("feather", self.feather, 0, MAX_FEATHER, " px")
        _range("temporal_strength", self.temporal_strength, 0, 0.999, "")
        if self.soft and self.feather and self.feather_mode != "gaussian":
            raise FrugalError(
                f"threshold 0 with feather mode {self.feather_mode}",
                "a hard edge to measure the distance from",
                "set threshold above 0, or feather_mode to gaussian",
            )

    @property
    def soft(self) -> bool:
        """Whether grey values are kept."""
        return self.threshold == 0

    @property
    def only_smooths(self) -> bool:
        """Whether temporal smoothing is the only step that changes a value."""
        steps = self.fill_holes or self.cleans_islands or self.grow or self.feather
        return self.soft and self.temporal != "off" and not steps

    @property
    def cleans_islands(self) -> bool:
        return self.drop_islands > 1 or self.keep_largest > 0

    @property
    def widths(self) -> tuple[int, int, int]:
        """Box widths in px of the gaussian feather."""
        return box_widths(self.feather)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FrugalError(
            f"{name} {value!r}", f"one of {', '.join(allowed)}", f"choose another {name}"
        )


def _range(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise FrugalError(
            f"{name} {value}{unit}", f"{low} to {high}{unit}", f"set {name} inside that range"
        )


def box_widths(sigma: float) -> tuple[int, int, int]:
    """Three odd box widths whose sequence has the standard deviation nearest to `sigma` px (Kovesi
    2010).
    """
    ideal = int(math.sqrt(12 * sigma * sigma / 3 + 1))
    lower = ideal if ideal % 2 else ideal - 1
    count = round((12 * sigma * sigma - 3 * lower * lower - 12 * lower - 9) / (-4 * lower - 4))
    widths = [lower] * count + [lower + 2] * (3 - count)
    return widths[0], widths[1], widths[2]


def ramp_table(feather: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Values by squared distance, float32 [R^2 + 1] twice: outside the mask by distance to it,
    inside by distance to the background. Distances are between pixel centres, so the nearest pixel
    of the other side is at 1.

    "ramp_out": 1 - d / feather outside. "ramp_in": d / feather inside. "ramp_center": half of the
    ramp on either side of the pixel edge, 0.5 -+ (d - 0.5) / feather.
    """
    reach = feather / 2 + 0.5 if mode == "ramp_center" else feather
    radius = int(np.ceil(reach))
    distance = np.sqrt(np.arange(radius * radius + 1, dtype=np.float64))
    one, zero = np.ones_like(distance), np.zeros_like(distance)
    if mode == "ramp_out":
        outside, inside = 1 - distance / feather, one
    elif mode == "ramp_in":
        outside, inside = zero, distance / feather
    else:
        outside, inside = 0.5 - (distance - 0.5) / feather, 0.5 + (distance - 0.5) / feather
    outside[0], inside[0] = 1, 0
    return (
        np.clip(outside, 0, 1).astype(np.float32),
        np.clip(inside, 0, 1).astype(np.float32),
    )
