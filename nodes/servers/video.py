"""The node that lets a server make a video."""

from __future__ import annotations

from comfy_api.v0_0_2 import InputImpl, io, ui

from ...servers.dialects import DIALECTS, VideoRequest
from .._comfy import CATEGORY, known, show_text
from . import glue, video_run
from .common_inputs import key_input


class FrugalRemoteVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalRemoteVideo",
            display_name="Wan Video on a Server (Frugal)",
            category=f"{CATEGORY}/remote",
            description=(
                "Lets a server with several or larger cards make a Wan video, from text or from a "
                "first image: vLLM-Omni, TensorRT-LLM or SGLang, through /v1/videos. Shows "
                "progress, takes the job off when cancelled, goes to the next address when a "
                "server is gone, and does not pay for a job twice."
            ),
            inputs=[
                io.String.Input(
                    "servers",
                    multiline=True,
                    default="http://127.0.0.1:8091/v1",
                    tooltip=(
                        "Addresses of the servers' API, one per line, often ending in /v1. The "
                        "first that can is used; prompt and image are sent there."
                    ),
                ),
                io.Combo.Input(
                    "dialect", options=list(DIALECTS), tooltip="Which server program runs there."
                ),
                io.String.Input("prompt", multiline=True, tooltip="What the video shows."),
                io.String.Input(
                    "negative_prompt", multiline=True, tooltip="What the video should not show."
                ),
                io.String.Input(
                    "model",
                    default="",
                    tooltip="Name of the model on the server. Empty: the one it has.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "frames", default=81, min=1, max=1025, step=4, tooltip="4 n + 1 frames."
                ),
                io.Int.Input(
                    "fps", default=16, min=1, max=120, tooltip="Frames per second. Wan 2.1: 16."
                ),
                io.Int.Input("steps", default=30, min=1, max=200, tooltip="Sampling steps."),
                io.Float.Input(
                    "guidance",
                    default=5.0,
                    min=0.1,
                    max=20.0,
                    step=0.1,
                    tooltip="CFG scale. Wan 2.1: 5, distilled models: 1.",
                ),
                io.Float.Input(
                    "flow_shift",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip=(
                        "Timestep shift; vLLM-Omni only. 0: the server's own, which is 5 in "
                        "vLLM-Omni whatever the model's is. Wan 2.1 480p: 3, 720p: 5."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Its lower 31 bits are sent. Servers differ in what they draw from it.",
                ),
                io.Float.Input(
                    "timeout_minutes",
                    default=60.0,
                    min=0.1,
                    max=1440.0,
                    step=1.0,
                    tooltip="How long to wait for the video. A later run finds the job again.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/remote",
                    tooltip="Folder and start of the file name inside output; a number is added.",
                ),
                key_input(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="First frame, for image to video models. Scaled to width x height.",
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="All frames."),
                io.Video.Output(
                    "video", display_name="video", tooltip="The file as the server sent it."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Who made it, how long it took, what differs.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **known(
                io.Schema,
                search_aliases=["vLLM", "TensorRT-LLM", "SGLang", "remote", "wan api", "cloud"],
            ),
        )

    @classmethod
    def execute(
        cls, servers, dialect, prompt, negative_prompt, model, width, height, frames, fps, steps,
        guidance, flow_shift, seed, timeout_minutes, filename_prefix, key_variable, image=None,
    ) -> io.NodeOutput:  # fmt: skip
        first = glue.fitted_png(image, width, height)
        request = VideoRequest(
            prompt, negative_prompt, model.strip(), width, height, frames, fps, steps, guidance,
            flow_shift, seed, first,
        )  # fmt: skip
        made = video_run.make(
            request, servers, dialect, key_variable, timeout_minutes, filename_prefix
        )
        show_text(cls.hidden.unique_id, made.report)
        shown = ui.SavedResult(made.path.name, made.subfolder, io.FolderType.output)
        return io.NodeOutput(
            made.images,
            InputImpl.VideoFromFile(str(made.path)),
            made.report,
            ui=ui.PreviewVideo([shown]),
        )
