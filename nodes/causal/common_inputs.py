"""Inputs and outputs that the causal nodes share."""

from __future__ import annotations

import comfy.samplers
from comfy_api.v0_0_2 import io

from ...kernels.causal.presets import AS_SET, CAUSAL_PRESETS
from .._comfy import CATEGORY

HOME = f"{CATEGORY}/wan"
Session = io.Custom("FRUGAL_CAUSAL_SESSION")
Prompts = io.Custom("FRUGAL_PROMPT_SCHEDULE")
ALIASES = ["wan", "causal", "self forcing", "autoregressive", "kv cache", "long video", "streaming"]


def block_input():
    return io.Int.Input(
        "frames_per_block",
        default=3,
        min=1,
        max=64,
        tooltip="Latent frames made at a time (4 pictures each); as the model was trained: 1 or 3.",
    )


def sampler_inputs() -> list:
    return [
        io.Model.Input("causal_model", tooltip="From Causal Model (Frugal)."),
        io.Conditioning.Input("positive", tooltip="What the video shall show at first."),
        io.Conditioning.Input("negative", tooltip="What it shall not show; unused when cfg is 1."),
        io.Latent.Input("latent", tooltip="Empty video latent: how long, how large."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of the noise. The same seed goes on with a session as one run would.",
        ),
        io.Int.Input(
            "steps", default=4, min=1, max=100, tooltip="Model calls per block, plus one."
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance. 1: off, half the calls and half the cache.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.SCHEDULER_NAMES),
            default="simple",
            tooltip="Noise levels of the steps of each block.",
        ),
        block_input(),
        io.Boolean.Input(
            "recache",
            default=True,
            tooltip=(
                "When the prompt changes, compute the frames in sight anew under it: one "
                "call per kept block. Off: the old prompt fades with its frames."
            ),
        ),
        io.Boolean.Input(
            "keep_session",
            default=False,
            tooltip="Keep the cache in main memory, so that the video can go on later.",
        ),
    ]


def video_inputs() -> list:
    return [
        Session.Input(
            "session", optional=True, tooltip="A video to go on with; it is not changed."
        ),
        Prompts.Input("prompts", optional=True, tooltip="Prompts for later seconds."),
        io.Latent.Input(
            "start_latent",
            optional=True,
            tooltip="Clean frames a new video begins with, for text to video models.",
        ),
    ]


def preset_input():
    return io.Combo.Input(
        "preset",
        options=[AS_SET, *CAUSAL_PRESETS],
        default=AS_SET,
        optional=True,
        tooltip=(
            "How a public model was trained: in place of steps, scheduler and frames_per_block "
            "here, and of window, sink, positions and shift of the model node."
        ),
    )


def latent_output():
    return io.Latent.Output(
        "video_latent", display_name="video_latent", tooltip="The frames of this run."
    )


def session_output():
    return Session.Output(
        "next_session",
        display_name="next_session",
        tooltip="What the next run needs; empty unless kept.",
    )
