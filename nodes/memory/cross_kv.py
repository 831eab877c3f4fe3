"""The node that computes the constant part of Wan's cross-attention once per prompt."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, known, show_text
from . import cross_kv_run

EXACT, FP8 = "as computed", "fp8"


class FrugalWanConstantContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanConstantContext",
            display_name="Constant Context for Wan (Frugal)",
            category=f"{CATEGORY}/wan",
            description=(
                "Computes what Wan's cross-attention makes of the prompt and the start image once "
                "per run instead of in every step. The weights for it (15 % of the blocks of a "
                "14B text to video model, 26 % of image to video) then need no memory on the "
                "device and no transfer. The video is the same to the bit."
            ),
            inputs=[
                io.Model.Input("wan_model", tooltip="A Wan model, LoRAs and all."),
                io.Combo.Input(
                    "keep",
                    options=[EXACT, FP8],
                    default=EXACT,
                    tooltip=(
                        "as computed: same video to the bit. fp8: half the memory of 16 bit "
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
                        "kept during a run; the one not used longest goes first."
                    ),
                ),
                io.Boolean.Input(
                    "release_weights",
                    default=True,
                    tooltip=(
                        "Move the weights to main memory once every prompt is known. Dynamic "
                        "memory (NVIDIA, newer ComfyUI) does so by itself when it needs the room."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The same model, for any sampler."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What a run will save and keep, in bytes.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **known(
                io.Schema,
                search_aliases=[
                    "wan",
                    "cross attention cache",
                    "kv cache",
                    "low vram",
                    "block swap",
                    "offload",
                ],
            ),
        )

    @classmethod
    def execute(cls, wan_model, keep, contexts, release_weights) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def show(report) -> None:
            cross_kv_run.log(report)
            show_text(node_id, report.text())

        options = cross_kv_run.Options(keep == FP8, contexts, release_weights)
        model, plan = cross_kv_run.apply(wan_model, options, show)
        show_text(node_id, plan.text())
        return io.NodeOutput(model, plan.text())
