"""Inputs that Refine Mask shares with the nodes of one step, with one range each."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.masks import warm
from ...kernels.masks.settings import FEATHERS, MAX_FEATHER, MAX_RADIUS, MAX_REGIONS, SHAPES
from .._comfy import CATEGORY

FAMILY = f"{CATEGORY}/masks"
MAX_AREA = 2**31 - 1
MASK = "One mask or a clip of masks; it is not changed."


def warmed(cls) -> bool:
    """For a node's `validate_inputs`: refuses nothing, but a graph with the node has been queued,
    so the kernels may begin to compile while the nodes before it run.
    """
    warm.start()
    return True


def threshold(tooltip: str) -> io.Input:
    """The value above which a pixel is inside, where 0 keeps grey values."""
    return io.Float.Input("threshold", default=0.5, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def regions(fill_holes: int, drop_islands: int) -> list[io.Input]:
    """What happens to holes and regions, by area in px; the arguments are defaults."""
    return [
        io.Int.Input(
            "fill_holes",
            default=fill_holes,
            min=-1,
            max=MAX_AREA,
            tooltip=(
                "Fill enclosed holes of up to this many pixels (area). 0 = off, -1 = all; gaps "
                "that reach the image border are not holes."
            ),
        ),
        io.Int.Input(
            "drop_islands",
            default=drop_islands,
            min=0,
            max=MAX_AREA,
            tooltip="Remove regions smaller than this many pixels (area). 0 = off.",
        ),
        io.Int.Input(
            "keep_largest",
            default=0,
            min=0,
            max=MAX_REGIONS,
            tooltip="Keep only this many of the largest regions in each frame. 0 = all.",
        ),
    ]


def growth(default: int, shape_tooltip: str) -> list[io.Input]:
    """Radius in px and shape."""
    return [
        io.Int.Input(
            "grow",
            default=default,
            min=-MAX_RADIUS,
            max=MAX_RADIUS,
            tooltip="Radius in pixels by which the mask grows; negative shrinks it.",
        ),
        io.Combo.Input(
            "grow_shape", options=list(SHAPES), default=SHAPES[0], tooltip=shape_tooltip
        ),
    ]


def soft_edge(default: float, tooltip: str, mode_tooltip: str) -> list[io.Input]:
    """Length of the soft edge in px and its kind."""
    return [
        io.Float.Input(
            "feather", default=default, min=0.0, max=MAX_FEATHER, step=0.5, tooltip=tooltip
        ),
        io.Combo.Input(
            "feather_mode", options=list(FEATHERS), default=FEATHERS[0], tooltip=mode_tooltip
        ),
    ]


def closing_radius() -> io.Input:
    """Radius in px of a closing."""
    return io.Int.Input(
        "radius",
        default=16,
        min=1,
        max=MAX_RADIUS,
        tooltip="For closing only: radius in pixels.",
    )


def share(name: str, tooltip: str) -> io.Input:
    """How much of the neighbouring frame stays."""
    return io.Float.Input(name, default=0.5, min=0.0, max=0.99, step=0.01, tooltip=tooltip)
