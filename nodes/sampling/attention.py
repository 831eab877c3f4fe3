"""The node that chooses the attention kernel."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import attention_run
from .common_inputs import model_input, percent_input


class FrugalAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalAttention",
            display_name="Attention Kernel (Sage, Flash)",
            category=f"{CATEGORY}/sampling",
            description=(
                "Computes the model's attention with the fastest kernel on this machine. Each "
                "shape is measured once, on its first call, and every kernel is checked before it "
                "is used. After a run the node shows which kernel ran which calls, and how fast."
            ),
            inputs=[
                model_input(),
                io.Combo.Input(
                    "kernel",
                    options=list(attention_run.CHOICES),
                    default=attention_run.AUTO,
                    tooltip=(
                        "auto: the fastest accurate kernel, by measurement. A named kernel takes "
                        "the calls it supports, the fastest exact one the rest. An attention node "
                        "before this one stays active, see the help page."
                    ),
                ),
                io.Boolean.Input(
                    "allow_8bit",
                    default=False,
                    tooltip=(
                        "Allow 8-bit kernels (sage, kitchen-int8) in self-attention over 1024 "
                        "tokens or more. Faster, slightly less accurate."
                    ),
                ),
                percent_input(
                    "start_percent",
                    0.0,
                    "Use 8-bit kernels only after this point of the schedule, 0 to 1.",
                ),
                percent_input(
                    "end_percent",
                    1.0,
                    "Use 8-bit kernels only before this point of the schedule, 0 to 1.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The model with this attention."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Kernels available on this machine, and why others are not.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "flash attention",
                    "sage attention",
                    "sdpa",
                    "cudnn",
                    "xformers",
                    "attention backend",
                    "sage",
                    "sageattention",
                    "flash",
                ],
                "FrugalAttention",
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
