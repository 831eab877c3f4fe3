"""The node that encodes a clip of any length in constant memory."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import encode_run
from .common_inputs import report_output, tile_inputs, vae_input


class FrugalWanEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanEncode",
            display_name="Encode Wan Video",
            category=f"{CATEGORY}/wan",
            description=(
                "Encodes images or a video to a Wan LATENT a few frames at a time: the same LATENT "
                "as VAE Encode, in device memory that does not grow with the length. A video file "
                "is read frame by frame."
            ),
            inputs=[
                vae_input(),
                io.Image.Input(
                    "images", optional=True, tooltip="The frames of one clip; or connect video."
                ),
                io.Video.Input(
                    "video", optional=True, tooltip="A video of any length; or connect images."
                ),
                *tile_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="One latent for the first frame, one for every four after.",
                ),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(["vae encode", "wan encode", "video to latent", "streaming encode"]),
        )

    @classmethod
    def execute(cls, vae, images=None, video=None, tile_size=0, overlap=64) -> io.NodeOutput:
        latent, report = encode_run.encode(vae, images, video, tile_size, overlap)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(latent, report)
