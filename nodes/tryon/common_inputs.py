"""Inputs and outputs that several try-on nodes have, with one range and default each."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.tryon import blending, canvas
from .._comfy import CATEGORY

FAMILY = f"{CATEGORY}/try-on"
WORDS = ["catvton", "virtual try-on", "vton", "clothes", "garment"]
VAE = "SD 1.5 VAE; CatVTON was trained with sd-vae-ft-mse."


def canvas_size(width_tooltip: str, height_tooltip: str) -> list[io.Input]:
    """Width and height of the canvas in px."""
    sides = (("width", 768, width_tooltip), ("height", 1024, height_tooltip))
    return [
        io.Int.Input(name, default=default, min=64, max=4096, step=8, tooltip=tooltip)
        for name, default, tooltip in sides
    ]


def fit(tooltip: str) -> io.Input:
    """How a photo comes onto the canvas."""
    return io.Combo.Input(
        "fit", options=[canvas.CROP, canvas.LETTERBOX], default=canvas.CROP, tooltip=tooltip
    )


FIT_WITH_CONTEXT = (
    "crop around mask: a window around the mask, with 25 % context. letterbox: the whole photo "
    "with bars."
)


def steps(tooltip: str) -> io.Input:
    """Number of sampling steps."""
    return io.Int.Input("steps", default=50, min=1, max=500, tooltip=tooltip)


def cfg() -> io.Input:
    """Strength of guidance."""
    return io.Float.Input(
        "cfg",
        default=2.5,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip=(
            "Guidance scale, the strength of the garment: 2.5 as published. 1 = off, twice as fast."
        ),
    )


def eta(tooltip: str) -> io.Input:
    """Share of fresh noise per step (DDIM, arXiv 2010.02502)."""
    return io.Float.Input("eta", default=1.0, min=0.0, max=1.0, step=0.05, tooltip=tooltip)


def seed(tooltip: str) -> io.Input:
    """Seed of the noise."""
    return io.Int.Input(
        "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip
    )


def mask_blur(tooltip: str) -> io.Input:
    """Softness of the seam in px."""
    return io.Int.Input("mask_blur", default=9, min=0, max=256, tooltip=tooltip)


SHORT_BLUR = "Softness of the mask's edge: standard deviation in canvas px."


def blend() -> io.Input:
    """On which side of the mask's edge the seam is."""
    return io.Combo.Input(
        "blend",
        options=list(blending.BLENDS),
        default=blending.INSIDE,
        optional=True,
        tooltip=(
            "Where mask_blur softens the edge. inside the mask: no pixel outside the mask changes. "
            "both sides: pixels up to three times mask_blur outside the mask change too."
        ),
    )


def garment_mask(name: str = "garment_mask", what: str = "mask", **extra) -> io.Input:
    """Transparency of the garment as ComfyUI's loader gives it."""
    return io.Mask.Input(
        name,
        optional=True,
        tooltip=f"The {what} of the garment's Load Image node: what is transparent in the file "
        "becomes white instead of black.",
        **extra,
    )


def memory_budget() -> io.Input:
    """GiB for the work of the UNet in a batch."""
    return io.Float.Input(
        "memory_budget",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.1,
        tooltip=(
            "Working memory of the UNet in GiB, in addition to its weights. 0 = what ComfyUI "
            "reports free."
        ),
    )


def largest_group() -> io.Input:
    """Most pictures per forward in a batch."""
    return io.Int.Input(
        "largest_group",
        default=8,
        min=1,
        max=64,
        tooltip="Maximum number of images per forward pass, regardless of memory.",
    )


def color_match(tooltip: str) -> io.Input:
    """Whether the painted colours are matched to the photo's."""
    return io.Boolean.Input("color_match", default=False, optional=True, tooltip=tooltip)


SHORT_MATCH = "Match the painted colours to the photo around the mask."


def canvases() -> list[io.Input]:
    """Person and garment as 'Prepare Try-On' gives them."""
    return [
        io.Image.Input("person_canvas", tooltip="Person from 'Prepare Try-On'."),
        io.Image.Input("garment_canvas", tooltip="Garment from 'Prepare Try-On'."),
    ]


def sides(latent_tooltip: str) -> list[io.Output]:
    """Conditioning for both sides of cfg, and the latent to start from."""
    return [
        io.Conditioning.Output("positive", display_name="positive", tooltip="With the garment."),
        io.Conditioning.Output("negative", display_name="negative", tooltip="Without the garment."),
        io.Latent.Output("latent", display_name="latent", tooltip=latent_tooltip),
    ]


def pictures(as_lists: bool = False) -> list[io.Output]:
    """The finished photo, and what the model painted."""
    return [
        io.Image.Output(
            "image",
            display_name="image",
            is_output_list=as_lists,
            tooltip="The photo with the garment on.",
        ),
        io.Image.Output(
            "canvas",
            display_name="canvas",
            is_output_list=as_lists,
            tooltip="What the model painted, at canvas size, not composited.",
        ),
    ]


def other_sampler() -> list[io.Input]:
    """A SAMPLER and its noise levels in place of CatVTON's."""
    return [
        io.Sampler.Input(
            "sampler",
            optional=True,
            tooltip="Sampler to use instead of CatVTON's; needs sigmas.",
        ),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels for that sampler."),
    ]
