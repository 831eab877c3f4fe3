"""Conditioning for the mask-free CatVTON, whose canvas has the garment beside the person."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from comfy_api.v0_0_2 import io

from ...kernels.tryon import latents, pictures
from .._comfy import found_by
from . import common_inputs, glue


def conditioning(
    person: torch.Tensor, garment: torch.Tensor, vae: Any
) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """(positive, negative, LATENT [B, 4, h, 2w]) for canvases [B, H, W, 3] of one size.

    ComfyUI hands instruct-pix2pix models `concat_latent_image` as it is, so it is brought to the
    model's scale here. The negative side has zeros in place of the garment.
    """
    person, garment = pictures.as_rgb(person, "person"), pictures.as_rgb(garment, "garment")
    size = (person.shape[1], person.shape[2])
    latents.check_canvas(
        size, (garment.shape[1], garment.shape[2]), (1, *size), glue.vae_factor(vae)
    )
    B = pictures.common_batch(person=person.shape[0], garment=garment.shape[0])
    scale = comfy.latent_formats.SD15().process_in
    left, right = (
        scale(glue.encode(vae, picture)).expand(B, -1, -1, -1) for picture in (person, garment)
    )

    def side(beside: torch.Tensor) -> list[Any]:
        entries = {"concat_latent_image": latents.beside(left, beside)}
        return [[torch.zeros((1, 1, glue.CONTEXT_WIDTH)), entries]]

    start = torch.zeros(
        (B, 4, left.shape[2], 2 * left.shape[3]),
        device=comfy.model_management.intermediate_device(),
    )
    return side(right), side(torch.zeros_like(right)), {"samples": start}


class FrugalTryOnMaskFree(io.ComfyNode):
    """Canvases to conditioning of the mask-free model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnMaskFree",
            display_name="Try-On Conditioning, Mask-Free",
            category=common_inputs.FAMILY,
            description=(
                "Encodes person and garment side by side for the mask-free CatVTON (8 input "
                "channels, base instruct-pix2pix). The model itself finds what to change."
            ),
            inputs=[
                *common_inputs.canvases(),
                io.Vae.Input("vae", tooltip=common_inputs.VAE),
            ],
            outputs=common_inputs.sides(
                "Empty latent, person and garment side by side: twice the canvas's width."
            ),
            **found_by(["catvton", "virtual try-on", "no mask", "pix2pix"]),
        )

    @classmethod
    def execute(cls, person_canvas, garment_canvas, vae):
        return io.NodeOutput(*conditioning(person_canvas, garment_canvas, vae))


NODES = [FrugalTryOnMaskFree]
