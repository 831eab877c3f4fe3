"""Nodes for causal Wan: the model, the sampler, prompts over time, sessions on disk."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ...kernels.causal.options import CacheOptions
from ...kernels.causal.presets import AS_SET
from ...kernels.causal.storage import FP8, INT8, MODEL
from ...kernels.causal.strategies import GATHER, IN_PLACE, MERGE
from .._comfy import known, show_text
from .._models import offered
from . import model_run as causal_model
from . import session_files, video_run
from .common_inputs import (
    ALIASES,
    HOME,
    Prompts,
    Session,
    block_input,
    latent_output,
    preset_input,
    sampler_inputs,
    session_output,
    video_inputs,
)
from .video_file import FrugalCausalVideoFile

PAGES = {"model type": MODEL, "fp8": FP8, "int8": INT8}
RELATIVE, ABSOLUTE = "relative", "absolute"
DEVICE, MAIN = "device memory", "main memory"
WAYS = {"gathered": GATHER, "run by run": MERGE, "in place": IN_PLACE}


class FrugalCausalModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalModel",
            display_name="Causal Model (Frugal)",
            category=HOME,
            description=(
                "Makes a Wan 2.1 model causal: frames see only those before them, through a cache "
                "of constant size. For models trained that way (Self-Forcing, CausVid, LongLive), "
                "whatever their file says; a model trained on whole clips gives poor videos."
            ),
            inputs=[
                io.Model.Input("wan_model", tooltip="A Wan model, LoRAs and all."),
                io.Int.Input(
                    "window",
                    default=21,
                    min=0,
                    max=4096,
                    tooltip="Latent frames seen, the block in work included. 0: all, without end.",
                ),
                io.Int.Input(
                    "sink",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="First latent frames of the video that stay in sight for ever.",
                ),
                io.Combo.Input(
                    "positions",
                    options=[RELATIVE, ABSOLUTE],
                    default=RELATIVE,
                    tooltip=(
                        "relative: kept frames close ranks, time never runs past window + sink. "
                        "absolute: a frame keeps its number."
                    ),
                ),
                io.Combo.Input(
                    "pages",
                    options=list(PAGES),
                    default="model type",
                    tooltip="How keys and values are kept: as computed, or in 1 byte per value.",
                ),
                io.Combo.Input(
                    "keep_in",
                    options=[DEVICE, MAIN],
                    default=DEVICE,
                    tooltip="Where they lie during a run. main memory: copied in for each layer.",
                ),
                io.Combo.Input(
                    "attend",
                    options=list(WAYS),
                    default="gathered",
                    tooltip=(
                        "gathered: one copy of a layer's pages, the chosen attention backend. run "
                        "by run: three frames at a time in torch's own attention, less memory. "
                        "in place: through a block table, on CUDA with absolute positions and "
                        "pages in the model's type on the device, where a kernel can; else "
                        "gathered."
                    ),
                ),
                io.Float.Input(
                    "budget_gb",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.1,
                    tooltip="Most gigabytes (10^9 bytes) of pages; refused before. 0: no limit.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Shift of the noise schedule; causal models use 5. 0: the model's own.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="For the causal sampler, and no other."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Bytes per latent frame, and how it attends.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **known(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def execute(
        cls, wan_model, window, sink, positions, pages, keep_in, attend, budget_gb, shift
    ) -> io.NodeOutput:
        options = CacheOptions(
            window, sink, PAGES[pages], positions == RELATIVE, keep_in == MAIN, WAYS[attend],
            round(budget_gb * 1e9),
        )  # fmt: skip
        model, report = causal_model.make_causal(wan_model, options, shift)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(model, report)


class FrugalCausalSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalSampler",
            display_name="Causal Sampler (Frugal)",
            category=HOME,
            description=(
                "Makes a video block by block with a causal Wan model, of any length: the cache "
                "does not grow once its window is full. Can go on from a session, and change its "
                "prompt on the way."
            ),
            inputs=[*sampler_inputs(), *video_inputs(), preset_input()],
            outputs=[
                latent_output(),
                session_output(),
                io.String.Output(
                    "report", display_name="report", tooltip="Frames, bytes and model calls."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **known(io.Schema, search_aliases=[*ALIASES, "ksampler", "prompt travel"]),
        )

    @classmethod
    def execute(
        cls, causal_model, positive, negative, latent, seed, steps, cfg, scheduler,
        frames_per_block, recache, keep_session, session=None, prompts=(), start_latent=None,
        preset=AS_SET,
    ) -> io.NodeOutput:  # fmt: skip
        settings = video_run.Settings(
            seed, steps, cfg, scheduler, frames_per_block, recache, keep_session, preset
        )
        made, kept, report = video_run.make_video(
            causal_model, positive, negative, latent, settings, session, prompts, start_latent
        )
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(made, kept, report)


class FrugalCausalSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalSamplerSelect",
            display_name="Causal Sampler Select (Frugal)",
            category=HOME,
            description=(
                "The causal sampler for SamplerCustom and SamplerCustomAdvanced, without session "
                "and prompt changes."
            ),
            inputs=[block_input()],
            outputs=[
                io.Sampler.Output(
                    "sampler", display_name="sampler", tooltip="For a model from Causal Model."
                )
            ],
            **known(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def execute(cls, frames_per_block) -> io.NodeOutput:
        return io.NodeOutput(video_run.sampler(frames_per_block))


class FrugalCausalPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalPrompt",
            display_name="Causal Prompt (Frugal)",
            category=HOME,
            description="A prompt from some second of the run on. Chain them for several.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="What the video shall show then."),
                io.Float.Input(
                    "from_second",
                    default=5.0,
                    min=0.0,
                    max=86400.0,
                    step=0.25,
                    tooltip="Second of this run, at 16 pictures a second; from the next block on.",
                ),
                Prompts.Input(
                    "other_prompts", optional=True, tooltip="Another Causal Prompt's output."
                ),
            ],
            outputs=[
                Prompts.Output("prompts", display_name="prompts", tooltip="For the causal sampler.")
            ],
            **known(io.Schema, search_aliases=["prompt schedule", "prompt travel", "longlive"]),
        )

    @classmethod
    def execute(cls, conditioning, from_second, other_prompts=()) -> io.NodeOutput:
        return io.NodeOutput((*other_prompts, (from_second, conditioning)))


class FrugalSaveCausalSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalSaveCausalSession",
            display_name="Save Causal Session (Frugal)",
            category=HOME,
            description="Writes a session to output/causal_sessions, bit for bit.",
            inputs=[
                Session.Input("session", tooltip="From a causal sampler with keep_session on."),
                io.String.Input(
                    "filename_prefix",
                    default="video",
                    tooltip="Start of the file name; a number is added, no file is overwritten.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            **known(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def execute(cls, session, filename_prefix) -> io.NodeOutput:
        path = session_files.save(session, filename_prefix)
        return io.NodeOutput(ui=ui.PreviewText(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"))


class FrugalLoadCausalSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadCausalSession",
            display_name="Load Causal Session (Frugal)",
            category=HOME,
            description="Reads a saved session, to go on with its video.",
            inputs=[
                io.Combo.Input(
                    "session_name",
                    options=session_files.names(),
                    tooltip="A file in output/causal_sessions.",
                ),
            ],
            outputs=[
                Session.Output("session", display_name="session", tooltip="For the causal sampler.")
            ],
            **known(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def validate_inputs(cls, session_name=None):
        return offered(session_name, session_files.names(), f"output/{session_files.FOLDER}")

    @classmethod
    def fingerprint_inputs(cls, session_name):
        return session_files.fingerprint(session_name)

    @classmethod
    def execute(cls, session_name) -> io.NodeOutput:
        return io.NodeOutput(session_files.load(session_name))


NODES = [
    FrugalCausalModel,
    FrugalCausalSampler,
    FrugalCausalSamplerSelect,
    FrugalCausalPrompt,
    FrugalSaveCausalSession,
    FrugalLoadCausalSession,
    FrugalCausalVideoFile,
]
