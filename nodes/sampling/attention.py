"""The node that chooses the attention kernel."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, known, show_text
from . import attention_run
from .common_inputs import model_input, percent_input


class FrugalAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalAttention",
            display_name="Attention (Frugal)",
            category=f"{CATEGORY}/sampling",
            description=(
                "Computes the model's attention with the fastest kernel on this machine. Each "
                "shape is measured once, on the first call, and every kernel is checked before it "
                "is trusted. After a run the node shows which kernel took what, and how long."
            ),
            inputs=[
                model_input(),
                io.Combo.Input(
                    "kernel",
                    options=list(attention_run.CHOICES),
                    default=attention_run.AUTO,
                    tooltip=(
                        "auto: the fastest one that is right, by measurement. A named kernel "
                        "computes what it can, the fastest exact one the rest. An attention node "
                        "before this one stays in force, see the help page."
                    ),
                ),
                io.Boolean.Input(
                    "allow_8bit",
                    default=False,
                    tooltip=(
                        "Let kernels that compute in 8 bits (sage, kitchen-int8) take part: in "
                        "self-attention over 1024 tokens or more. Faster, a little less exact."
                    ),
                ),
                percent_input(
                    "start_percent",
                    0.0,
                    "8-bit kernels only after this part of the schedule, 0 to 1.",
                ),
                percent_input(
                    "end_percent",
                    1.0,
                    "8-bit kernels only before this part of the schedule, 0 to 1.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The model with this attention."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The kernels of this machine, and why others are not there.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **known(
                io.Schema,
                search_aliases=[
                    "flash attention",
                    "sage attention",
                    "sdpa",
                    "cudnn",
                    "xformers",
                    "attention backend",
                ],
            ),
        )

    @classmethod
    def execute(cls, base_model, kernel, allow_8bit, start_percent, end_percent) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        model = attention_run.apply(
            base_model, kernel, allow_8bit, start_percent, end_percent, node_id=node_id
        )
        text = attention_run.survey(base_model)
        show_text(node_id, text)
        return io.NodeOutput(model, text)
