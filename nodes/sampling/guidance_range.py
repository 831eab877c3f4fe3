"""The node that limits guidance to a part of the schedule."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by
from . import guidance_range_run
from .common_inputs import model_input, percent_input


class FrugalGuidanceRange(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalGuidanceRange",
            display_name="Guidance Range",
            category=f"{CATEGORY}/sampling",
            description=(
                "Uses guidance (cfg) only in part of the schedule. Outside it cfg is 1: the "
                "negative prompt is skipped, and a step costs half."
            ),
            inputs=[
                model_input(),
                percent_input(
                    "start_percent", 0.0, "Point of the schedule where guidance starts, 0 to 1."
                ),
                percent_input(
                    "end_percent", 0.8, "Point of the schedule where guidance ends, 0 to 1."
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The same model, for any sampler."
                )
            ],
            **found_by(
                [
                    "cfg override",
                    "cfg interval",
                    "limited interval",
                    "speed up",
                    "cfg range",
                    "cfg",
                ],
                "FrugalGuidanceRange",
            ),
        )

    @classmethod
    def execute(cls, base_model, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(guidance_range_run.apply(base_model, start_percent, end_percent))
