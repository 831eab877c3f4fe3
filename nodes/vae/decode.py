"""The nodes that decode a video of any length in constant memory."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import decode_run
from .common_inputs import latent_input, report_output, tile_inputs, vae_input
from .video_output import file_inputs, metadata, prefix_checked, shown_videos, video_output


class FrugalWanDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanDecode",
            display_name="Decode Wan Video",
            category=f"{CATEGORY}/wan",
            description=(
                "Decodes a Wan LATENT a few frames at a time: the same frames as VAE Decode, in "
                "device memory that does not grow with the length. The LATENT is kept on disk "
                "until the last frame is decoded."
            ),
            inputs=[latent_input(), vae_input(), *tile_inputs()],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", tooltip="All frames, clip after clip."
                ),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "vae decode",
                    "wan decode",
                    "streaming decode",
                    "tiled decode",
                    "vae tiled",
                    "vae decode tiled",
                ],
                "FrugalWanDecode",
            ),
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0, overlap=64) -> io.NodeOutput:
        images, report = decode_run.to_images(vae, samples, tile_size, overlap)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(images, report)


class FrugalWanDecodeToFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanDecodeToFile",
            display_name="Decode Wan Video to File",
            category=f"{CATEGORY}/wan",
            description=(
                "Decodes a Wan LATENT directly into a video file in the output folder: memory does "
                "not grow with the length. If decoding is interrupted, the frames so far are a "
                "playable file and the LATENT is kept on disk."
            ),
            inputs=[
                latent_input(),
                vae_input(),
                *file_inputs(),
                *tile_inputs(),
            ],
            outputs=[
                video_output(),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            **found_by(
                [
                    "save video",
                    "vae decode",
                    "mp4",
                    "webm",
                    "streaming decode",
                    "video combine",
                    "vhs",
                    "vhs video combine",
                    "vae tiled",
                ],
                "FrugalWanDecodeToFile",
            ),
        )

    validate_inputs = classmethod(prefix_checked)

    @classmethod
    def execute(
        cls, samples, vae, filename_prefix, fps, format, quality, tile_size=0, overlap=64
    ) -> io.NodeOutput:
        paths, subfolder, report = decode_run.to_files(
            vae, samples, filename_prefix, fps, format, quality, tile_size, overlap,
            metadata(cls.hidden),
        )  # fmt: skip
        show_text(cls.hidden.unique_id, report)
        videos, shown = shown_videos(paths, subfolder)
        return io.NodeOutput(videos, report, ui=shown)
