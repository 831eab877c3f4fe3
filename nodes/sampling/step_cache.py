"""The node that skips model calls whose result can be predicted."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import step_cache_run
from .common_inputs import model_input, percent_input


class FrugalStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalStepCache",
            display_name="Step Cache",
            category=f"{CATEGORY}/sampling",
            description=(
                "Skips model calls whose result can be predicted: the velocity is extrapolated "
                "along a line as far as the error observed so far allows. Needs no calibration, "
                "works with any model and sampler, and reports what it skipped and how accurate "
                "the predictions were."
            ),
            inputs=[
                model_input(),
                io.Float.Input(
                    "threshold",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip=(
                        "Largest accepted error of the guided velocity, averaged over the path "
                        "(0.05 = 5 %); higher skips more. 0 = off: the same result to the bit."
                    ),
                ),
                percent_input(
                    "start_percent",
                    0.15,
                    "Before this point of the schedule (0 to 1) every call is made.",
                ),
                percent_input(
                    "end_percent",
                    0.95,
                    "After this point of the schedule (0 to 1) every call is made.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Maximum number of consecutive steps without a model call.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The same model, for any sampler."
                )
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "easycache",
                    "lazycache",
                    "teacache",
                    "magcache",
                    "first block cache",
                    "speed up",
                    "skip steps",
                    "tea cache",
                ],
                "FrugalStepCache",
            ),
        )

    @classmethod
    def execute(cls, base_model, threshold, start_percent, end_percent, max_skips) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def show(report) -> None:
            step_cache_run.log(report)
            show_text(node_id, report.text())

        options = step_cache_run.Options(threshold, start_percent, end_percent, max_skips)
        return io.NodeOutput(step_cache_run.apply(base_model, options, show))
