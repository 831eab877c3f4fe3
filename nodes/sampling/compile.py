"""The node that compiles a Wan model's blocks without giving up the streaming of its weights."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import compile_run
from .common_inputs import model_input


class FrugalCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCompile",
            display_name="Compile Blocks",
            category=f"{CATEGORY}/sampling",
            description=(
                "Compiles the blocks of a Wan model with torch.compile while their weights stay "
                "where ComfyUI keeps them: offloading, dynamic VRAM, quantised files and LoRAs "
                "keep working. The first step takes longer, later ones less."
            ),
            inputs=[model_input()],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The same model, for any sampler."
                )
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                ["torch.compile", "torchcompile", "inductor", "triton", "speed up"], "FrugalCompile"
            ),
        )

    @classmethod
    def execute(cls, base_model) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def show(report) -> None:
            compile_run.log(report)
            show_text(node_id, report.text())

        return io.NodeOutput(compile_run.apply(base_model, show))
