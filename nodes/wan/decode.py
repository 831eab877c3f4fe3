"""The nodes that decode a video of any length in constant memory."""

from __future__ import annotations

import json

from comfy.cli_args import args
from comfy_api.v0_0_2 import InputImpl, io, ui

from ...kernels.video.writer import FORMATS, QUALITIES
from .._comfy import CATEGORY, known, show_text
from . import vae_decode
from .vae_ports import latent_input, report_output, tile_inputs, vae_input


class FrugalWanDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanDecode",
            display_name="Decode Wan Video (Frugal)",
            category=f"{CATEGORY}/wan",
            description=(
                "Decodes a Wan LATENT a few frames at a time: the same frames as VAE Decode, in "
                "device memory that does not grow with the length. The LATENT is kept on disk "
                "until the last frame is through."
            ),
            inputs=[latent_input(), vae_input(), *tile_inputs()],
            outputs=[
                io.Image.Output("images", tooltip="All frames, clip after clip."),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id],
            **known(
                io.Schema,
                search_aliases=["vae decode", "wan decode", "streaming decode", "tiled decode"],
            ),
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0, overlap=64) -> io.NodeOutput:
        images, report = vae_decode.to_images(vae, samples, tile_size, overlap)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(images, report)


class FrugalWanDecodeToFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanDecodeToFile",
            display_name="Decode Wan Video to File (Frugal)",
            category=f"{CATEGORY}/wan",
            description=(
                "Decodes a Wan LATENT straight into a video file in the output folder: memory does "
                "not grow with the length. If it is cut off, the frames so far are a playable "
                "file and the LATENT is kept on disk."
            ),
            inputs=[
                latent_input(),
                vae_input(),
                io.String.Input(
                    "filename_prefix",
                    default="video/wan",
                    tooltip=(
                        "Folder and start of the file name inside output; a number is added. "
                        "%width%, %height%, %year%, %month%, %day% are filled in."
                    ),
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=240.0,
                    step=0.01,
                    tooltip="Frames per second of the file. Wan 2.1: 16. Wan 2.2 5B: 24.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    tooltip="H.264 plays everywhere; AV1 and VP9 take longer, for smaller files.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default="good",
                    tooltip=(
                        "Constant quality of the file. As crf, high/good/small: H.264 17/21/27, "
                        "AV1 23/30/38, VP9 24/31/38."
                    ),
                ),
                *tile_inputs(),
            ],
            outputs=[
                io.Video.Output(
                    "video", is_output_list=True, tooltip="The file, one per clip of the batch."
                ),
                report_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            **known(
                io.Schema,
                search_aliases=["save video", "vae decode", "mp4", "webm", "streaming decode"],
            ),
        )

    @classmethod
    def execute(
        cls, samples, vae, filename_prefix, fps, format, quality, tile_size=0, overlap=64
    ) -> io.NodeOutput:
        paths, subfolder, report = vae_decode.to_files(
            vae, samples, filename_prefix, fps, format, quality, tile_size, overlap,
            _metadata(cls.hidden),
        )  # fmt: skip
        show_text(cls.hidden.unique_id, report)
        shown = [ui.SavedResult(path.name, subfolder, io.FolderType.output) for path in paths]
        videos = [InputImpl.VideoFromFile(str(path)) for path in paths]
        return io.NodeOutput(videos, report, ui=ui.PreviewVideo(shown))


def _metadata(hidden) -> dict[str, str]:
    """The graph, as ComfyUI's own 'Save Video' writes it."""
    if args.disable_metadata:
        return {}
    found = {**(hidden.extra_pnginfo or {}), "prompt": hidden.prompt}
    return {name: json.dumps(value) for name, value in found.items() if value is not None}
