"""The node that computes the constant part of Wan's cross-attention once per prompt."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from . import cross_kv_run

EXACT, FP8 = "as computed", "fp8"


class FrugalWanConstantContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanConstantContext",
            display_name="Cache Cross-Attention K/V",
            category=f"{CATEGORY}/wan",
            description=(
                "Computes the cross-attention keys and values of the prompt and the start image "
                "once per run instead of in every step. Their weights (15 % of the blocks of a 14B "
                "text to video model, 26 % of image to video) then need no device memory and no "
                "transfer. The video is the same to the bit."
            ),
            inputs=[
                io.Model.Input("wan_model", tooltip="A Wan model, with its LoRAs already applied."),
                io.Combo.Input(
                    "kv_dtype",
                    options=[EXACT, FP8],
                    default=EXACT,
                    tooltip=(
                        "as computed: same video to the bit. fp8: half the memory of 16-bit "
                        "values, rounded to 1 byte with a scale per token."
                    ),
                ),
                io.Int.Input(
                    "contexts",
                    default=8,
                    min=1,
                    max=256,
                    tooltip=(
                        "How many prompts (or batches of prompts) and how many start images are "
                        "cached during a run. The least recently used one is evicted."
                    ),
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "release_weights",
                    default=True,
                    tooltip=(
                        "Move these weights to main memory once every prompt is cached. ComfyUI's "
                        "dynamic VRAM (NVIDIA, newer versions) does so by itself when it needs the "
                        "room."
                    ),
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The same model, for any sampler."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Bytes that a run will save and cache.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "wan",
                    "cross attention cache",
                    "kv cache",
                    "low vram",
                    "block swap",
                    "offload",
                ]
            ),
        )

    @classmethod
    def execute(cls, wan_model, kv_dtype, contexts, release_weights) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def show(report) -> None:
            cross_kv_run.log(report)
            show_text(node_id, report.text())

        options = cross_kv_run.Options(kv_dtype == FP8, contexts, release_weights)
        model, plan = cross_kv_run.apply(wan_model, options, show)
        show_text(node_id, plan.text())
        return io.NodeOutput(model, plan.text())
