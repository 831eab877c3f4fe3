"""Nodes for causal Wan: the model, the sampler, prompts over time, sessions on disk."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ...kernels.causal.options import CacheOptions
from ...kernels.causal.presets import AS_SET
from ...kernels.causal.storage import FP8, INT8, MODEL
from ...kernels.causal.strategies import CHUNKED, GATHERED, PAGED
from .._comfy import ADVANCED, found_by, show_text
from .._models import offered
from .._output import prefix_problem
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

KV_TYPES = {"model type": MODEL, "fp8": FP8, "int8": INT8}
RELATIVE, ABSOLUTE = "relative", "absolute"
DEVICE, MAIN = "device memory", "main memory"
WAYS = (GATHERED, CHUNKED, PAGED)


class FrugalCausalModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalModel",
            display_name="Causal Model",
            category=HOME,
            description=(
                "Makes a Wan 2.1 model causal: frames attend only to earlier frames, through a KV "
                "cache of constant size. For models trained that way (Self-Forcing, CausVid, "
                "LongLive), whatever their metadata says; a model trained on whole clips gives "
                "poor videos."
            ),
            inputs=[
                io.Model.Input("wan_model", tooltip="A Wan model, with its LoRAs already applied."),
                io.Int.Input(
                    "window",
                    default=21,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Attention window in latent frames, including the current block. 0 = "
                        "unlimited; the cache then grows with the video."
                    ),
                ),
                io.Int.Input(
                    "sink",
                    default=0,
                    min=0,
                    max=256,
                    tooltip=(
                        "Number of first latent frames that are always kept (attention sink). 0 = "
                        "none."
                    ),
                ),
                io.Combo.Input(
                    "positions",
                    options=[RELATIVE, ABSOLUTE],
                    default=RELATIVE,
                    tooltip=(
                        "relative: cached frames are re-indexed, so positions never exceed window "
                        "+ sink. absolute: each frame keeps its own position."
                    ),
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "kv_dtype",
                    options=list(KV_TYPES),
                    default="model type",
                    tooltip=(
                        "Data type of the KV cache: as computed, or 1 byte per value (fp8, int8)."
                    ),
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "kv_location",
                    options=[DEVICE, MAIN],
                    default=DEVICE,
                    tooltip=(
                        "Where the KV cache is stored during a run. main memory saves device "
                        "memory; each layer's part is copied in when it is needed."
                    ),
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "attention",
                    options=list(WAYS),
                    default=GATHERED,
                    tooltip=(
                        "gathered: copies a layer's pages together and calls the selected "
                        "attention backend. chunked: three frames at a time with PyTorch's "
                        "attention, using less memory. paged: reads pages through a block "
                        "table, on CUDA with absolute positions and pages in the model's type on "
                        "the device; if no kernel supports the call, gathered is used."
                    ),
                    **ADVANCED,
                ),
                io.Float.Input(
                    "max_cache_gb",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.1,
                    tooltip=(
                        "Maximum size of the KV cache in GB (10^9 bytes); checked before sampling. "
                        "0 = no limit."
                    ),
                    **ADVANCED,
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip=(
                        "Timestep shift of the noise schedule; causal models use 5. 0 = keep the "
                        "model's own."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For causal samplers only."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Cache size per latent frame, and the attention method.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(ALIASES),
        )

    @classmethod
    def execute(
        cls, wan_model, window, sink, positions, kv_dtype, kv_location, attention, max_cache_gb,
        shift,
    ) -> io.NodeOutput:  # fmt: skip
        options = CacheOptions(
            window, sink, KV_TYPES[kv_dtype], positions == RELATIVE, kv_location == MAIN, attention,
            round(max_cache_gb * 1e9),
        )  # fmt: skip
        model, report = causal_model.make_causal(wan_model, options, shift)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(model, report)


class FrugalCausalSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalSampler",
            display_name="Causal Sampler",
            category=HOME,
            description=(
                "Generates a video of any length block by block with a causal Wan model: the KV "
                "cache stops growing once its window is full. Can continue a session and change "
                "the prompt over time."
            ),
            inputs=[*sampler_inputs(), *video_inputs(), preset_input()],
            outputs=[
                latent_output(),
                session_output(),
                io.String.Output(
                    "report", display_name="report", tooltip="Frames, cache size and model calls."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [*ALIASES, "ksampler", "prompt travel", "infinite video"], "FrugalCausalSampler"
            ),
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
            display_name="Causal Sampler Select",
            category=HOME,
            description=(
                "The causal sampler for SamplerCustom and SamplerCustomAdvanced, without sessions "
                "and prompt changes."
            ),
            inputs=[block_input()],
            outputs=[
                io.Sampler.Output(
                    "sampler", display_name="sampler", tooltip="For a model from Causal Model."
                )
            ],
            **found_by(ALIASES),
        )

    @classmethod
    def execute(cls, frames_per_block) -> io.NodeOutput:
        return io.NodeOutput(video_run.sampler(frames_per_block))


class FrugalCausalPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCausalPrompt",
            display_name="Causal Prompt",
            category=HOME,
            description=(
                "Switches to another prompt at a given second of the run. Chain several for more "
                "than one change."
            ),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="Prompt from that second on."),
                io.Float.Input(
                    "from_second",
                    default=5.0,
                    min=0.0,
                    max=86400.0,
                    step=0.25,
                    tooltip=(
                        "Seconds from the start of this run, at 16 frames per second. Takes effect "
                        "with the next block."
                    ),
                ),
                Prompts.Input(
                    "other_prompts", optional=True, tooltip="Output of another Causal Prompt."
                ),
            ],
            outputs=[
                Prompts.Output("prompts", display_name="prompts", tooltip="For Causal Sampler.")
            ],
            **found_by(["prompt schedule", "prompt travel", "longlive"]),
        )

    @classmethod
    def execute(cls, conditioning, from_second, other_prompts=()) -> io.NodeOutput:
        return io.NodeOutput((*other_prompts, (from_second, conditioning)))


class FrugalSaveCausalSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalSaveCausalSession",
            display_name="Save Causal Session",
            category=HOME,
            description="Saves a session to output/causal_sessions, bit for bit.",
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
            **found_by(ALIASES),
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem(session_files.FOLDER, filename_prefix)

    @classmethod
    def execute(cls, session, filename_prefix) -> io.NodeOutput:
        path = session_files.save(session, filename_prefix)
        return io.NodeOutput(ui=ui.PreviewText(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"))


class FrugalLoadCausalSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadCausalSession",
            display_name="Load Causal Session",
            category=HOME,
            description="Loads a saved session, to continue its video.",
            inputs=[
                io.Combo.Input(
                    "session_name",
                    options=session_files.names(),
                    tooltip="A file in output/causal_sessions.",
                ),
            ],
            outputs=[
                Session.Output("session", display_name="session", tooltip="For Causal Sampler.")
            ],
            **found_by(ALIASES),
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
