"""The node that lets a server make a video."""

from __future__ import annotations

from comfy_api.v0_0_2 import InputImpl, io, ui

from ...servers.dialects import DIALECTS, VideoRequest
from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from .._output import prefix_problem
from . import glue, video_run
from .common_inputs import key_input


class FrugalRemoteVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalRemoteVideo",
            display_name="Wan Video on a Server",
            category=f"{CATEGORY}/servers",
            description=(
                "Generates a Wan video on a server with several or larger cards, from text or from "
                "a first image: vLLM-Omni, TensorRT-LLM or SGLang, through /v1/videos. Shows "
                "progress, cancels the job with the run, tries the next address when a server is "
                "down, and does not pay for a job twice."
            ),
            inputs=[
                io.String.Input(
                    "servers",
                    multiline=True,
                    default="http://127.0.0.1:8091/v1",
                    tooltip=(
                        "Base URLs of the servers' API, one per line, often ending in /v1; prompt "
                        "and image are sent there. The first one that works is used."
                    ),
                ),
                io.Combo.Input(
                    "dialect", options=list(DIALECTS), tooltip="Server software that runs there."
                ),
                io.String.Input("prompt", multiline=True, tooltip="What the video should show."),
                io.String.Input(
                    "negative_prompt", multiline=True, tooltip="What the video should not show."
                ),
                io.String.Input(
                    "model",
                    default="",
                    tooltip="Name of the model on the server. Empty = the one it has.",
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
                    "frames",
                    default=81,
                    min=1,
                    max=1025,
                    step=4,
                    tooltip=("Number of frames, of the form 4 n + 1."),
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
                        "Timestep shift; vLLM-Omni only (Wan 2.1 480p: 3, 720p: 5). 0 = the "
                        "server's default, which in vLLM-Omni is 5 for every model."
                    ),
                    **ADVANCED,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=(
                        "Noise seed; its lower 31 bits are sent. Different server software draws "
                        "different noise from it."
                    ),
                ),
                io.Float.Input(
                    "timeout_minutes",
                    default=60.0,
                    min=0.1,
                    max=1440.0,
                    step=1.0,
                    tooltip="Minutes to wait for the video. A later run picks up the same job.",
                    **ADVANCED,
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
                    tooltip="First frame, for image to video models; scaled to width x height.",
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
                    tooltip=(
                        "Which server made it, how long it took, and what differs from the request."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["vLLM", "TensorRT-LLM", "SGLang", "remote", "wan api", "cloud"]),
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem("", filename_prefix)

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
