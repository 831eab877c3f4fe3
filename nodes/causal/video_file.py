"""The node that writes a causal video while it is made."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.causal.presets import AS_SET
from .._comfy import found_by, show_text
from ..vae.common_inputs import tile_inputs, vae_input
from ..vae.video_output import file_inputs, metadata, prefix_checked, shown_videos, video_output
from . import video_run
from .common_inputs import (
    ALIASES,
    HOME,
    latent_output,
    preset_input,
    sampler_inputs,
    session_output,
    video_inputs,
)
from .live_decode import LiveVideo, Target


class FrugalCausalVideoFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalVideoFile",
            display_name="Causal Video to File",
            category=HOME,
            description=(
                "Causal Sampler that decodes each block as soon as it is sampled: frames appear on "
                "the node and go into a video file while later ones are being sampled. If the run "
                "is interrupted, the frames so far are a playable file."
            ),
            inputs=[
                *sampler_inputs(),
                vae_input(),
                *file_inputs(),
                io.Int.Input(
                    "decode_every",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip=(
                        "Number of blocks to decode at a time. Higher values show frames later, "
                        "but swap model and VAE on the device less often."
                    ),
                ),
                *tile_inputs(),
                *video_inputs(),
                preset_input(),
            ],
            outputs=[
                video_output(),
                latent_output(),
                session_output(),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Frames, cache size, model calls and decoding.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            **found_by(
                [*ALIASES, "save video", "vae decode", "mp4", "streaming decode", "infinite video"],
                "FrugalCausalVideoFile",
            ),
        )

    validate_inputs = classmethod(prefix_checked)

    @classmethod
    def execute(
        cls, causal_model, positive, negative, latent, seed, steps, cfg, scheduler,
        frames_per_block, recache, keep_session, vae, filename_prefix, fps, format, quality,
        decode_every, tile_size=0, overlap=64, session=None, prompts=(), start_latent=None,
        preset=AS_SET,
    ) -> io.NodeOutput:  # fmt: skip
        settings = video_run.Settings(
            seed, steps, cfg, scheduler, frames_per_block, recache, keep_session, preset
        )
        target = Target(
            filename_prefix, fps, format, quality, decode_every, tile_size, overlap,
            metadata(cls.hidden),
        )  # fmt: skip
        with LiveVideo(vae, target) as live:
            made, kept, report = video_run.make_video(
                causal_model, positive, negative, latent, settings, session, prompts,
                start_latent, live,
            )  # fmt: skip
        report = f"{report}\n{live.report()}"
        show_text(cls.hidden.unique_id, report)
        videos, shown = shown_videos(live.paths, live.subfolder)
        return io.NodeOutput(videos, made, kept, report, ui=shown)
