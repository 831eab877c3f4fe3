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
    """`frames_per_block`."""
    return io.Int.Input(
        "frames_per_block",
        default=3,
        min=1,
        max=64,
        tooltip=(
            "Latent frames per block (4 video frames each). Use what the model was trained with: 1 "
            "or 3."
        ),
    )


def sampler_inputs() -> list:
    """What every sampler of causal video takes first."""
    return [
        io.Model.Input("causal_model", tooltip="The MODEL output of Causal Model."),
        io.Conditioning.Input("positive", tooltip="Prompt for the beginning of the video."),
        io.Conditioning.Input("negative", tooltip="Negative prompt; not used when cfg is 1."),
        io.Latent.Input(
            "latent", tooltip=("Empty video latent: sets the size and the length of this run.")
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip=(
                "Noise seed. Continuing a session with the same seed gives the frames of one long "
                "run."
            ),
        ),
        io.Int.Input(
            "steps",
            default=4,
            min=1,
            max=100,
            tooltip=(
                "Denoising steps per block. Each block costs one more model call, which fills the "
                "cache."
            ),
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale. 1 = off, which halves the model calls and the cache.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.SCHEDULER_NAMES),
            default="simple",
            tooltip="Noise schedule of each block.",
        ),
        block_input(),
        io.Boolean.Input(
            "recache",
            default=True,
            tooltip=(
                "When the prompt changes, recompute the cached frames under the new one, with one "
                "model call per cached block. Off: the old prompt's influence ends only as its "
                "frames leave the window."
            ),
        ),
        io.Boolean.Input(
            "keep_session",
            default=False,
            tooltip=(
                "Keep the KV cache in main memory after the run, so that another run can continue "
                "the video."
            ),
        ),
    ]


def video_inputs() -> list:
    """Session and prompts over time."""
    return [
        Session.Input(
            "session", optional=True, tooltip="A session to continue; it is not changed."
        ),
        Prompts.Input(
            "prompts",
            optional=True,
            tooltip=("Prompts for later parts of the video, from Causal Prompt."),
        ),
        io.Latent.Input(
            "start_latent",
            optional=True,
            tooltip="Clean latent frames that a new video starts with; for text to video models.",
        ),
    ]


def preset_input():
    """`preset`, of the public causal models."""
    return io.Combo.Input(
        "preset",
        options=[AS_SET, *CAUSAL_PRESETS],
        default=AS_SET,
        optional=True,
        tooltip=(
            "Settings of a public model. They replace steps, scheduler and frames_per_block here, "
            "and window, sink, positions and shift of the model node."
        ),
    )


def latent_output():
    """The frames of this run."""
    return io.Latent.Output(
        "video_latent", display_name="video_latent", tooltip="Latent frames of this run."
    )


def session_output():
    """What the next run continues from."""
    return Session.Output(
        "next_session",
        display_name="next_session",
        tooltip="State from which the next run continues; empty if keep_session is off.",
    )
