"""Inputs and outputs that the VAE nodes share."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import ADVANCED


def vae_input():
    """`vae`."""
    return io.Vae.Input("vae", tooltip="The VAE of Wan 2.1 or Wan 2.2, matching the model.")


def latent_input():
    """`samples`."""
    return io.Latent.Input("samples", tooltip="The LATENT of a Wan sampler, of any length.")


def tile_inputs() -> list:
    """Size and overlap of tiles."""
    return [
        io.Int.Input(
            "tile_size",
            default=0,
            min=0,
            max=4096,
            step=32,
            optional=True,
            tooltip=(
                "Spatial tile size in pixels; 0 = whole frames, exact. Tiles take less memory and "
                "change the result; the report says by how much."
            ),
            **ADVANCED,
        ),
        io.Int.Input(
            "overlap",
            default=64,
            min=0,
            max=1024,
            step=16,
            optional=True,
            tooltip="Overlap of neighbouring tiles in pixels, blended. Used with tiles only.",
            **ADVANCED,
        ),
    ]


def report_output():
    """What was done, in words."""
    return io.String.Output(
        "report",
        display_name="report",
        tooltip="Pieces, memory, and what was done if memory ran out.",
    )
