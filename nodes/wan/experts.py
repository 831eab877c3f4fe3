"""The node that joins Wan 2.2's two experts."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from . import experts_run


class FrugalWanTwoExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalWanTwoExperts",
            display_name="Join Two Wan Experts",
            category=f"{CATEGORY}/wan",
            description=(
                "Combines Wan 2.2 A14B's high noise and low noise experts into one model, so that "
                "one sampler runs both and switches automatically. Only the expert in use is "
                "loaded."
            ),
            inputs=[
                io.Model.Input("high_noise", tooltip="The expert for the first, noisy steps."),
                io.Model.Input("low_noise", tooltip="The expert for the last steps."),
                io.Float.Input(
                    "boundary",
                    default=0.875,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip=(
                        "Noise level at which the experts switch, as a fraction of the largest "
                        "timestep. Wan 2.2: 0.875 for text to video, 0.9 for image to video."
                    ),
                ),
                io.Float.Input(
                    "cfg_low_noise",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="Guidance scale of the low noise steps. 0 = same as the sampler's.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="Both experts as one model, for any sampler.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=("Both files and the noise level of the switch."),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "wan 2.2",
                    "moe",
                    "high noise",
                    "low noise",
                    "a14b",
                    "refiner",
                    "wan i2v 2.2",
                    "two samplers",
                ],
                "FrugalWanTwoExperts",
            ),
        )

    @classmethod
    def execute(cls, high_noise, low_noise, boundary, cfg_low_noise=0.0) -> io.NodeOutput:
        model, text = experts_run.join(high_noise, low_noise, boundary, cfg_low_noise)
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(model, text)
