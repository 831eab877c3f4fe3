"""The node that says what this machine can do for the models of the pack."""

from __future__ import annotations

import itertools

from comfy_api.v0_0_2 import io

from ...kernels.memory.doctor import diagnose
from .._comfy import CATEGORY, found_by, show_text
from . import doctor_run

RUNS = itertools.count(1)


class FrugalDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalDoctor",
            display_name="Doctor",
            category=f"{CATEGORY}/memory",
            description=(
                "Reports what this machine and this ComfyUI can do: which quantised formats run "
                "natively, which kernels are available and why others are not, and which Wan and "
                "CatVTON models fit."
            ),
            inputs=[],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The findings as text."),
                io.String.Output(
                    "data", display_name="data", tooltip="All facts and findings as JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                ["diagnose", "system info", "vram", "cuda", "backends", "will it fit"],
                "FrugalDoctor",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls):
        # Free memory is another at every run.
        return next(RUNS)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        found = diagnose(doctor_run.gather())
        text, data = found.text(), found.json()
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(text, data, ui={"text": (text,), "frugal_doctor": (data,)})
