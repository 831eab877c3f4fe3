"""The node that measures what a quantised model lost from end to end."""

from __future__ import annotations

import json

import torch
from comfy_api.v0_0_2 import io, ui

from ...kernels.errors import FrugalError
from ...kernels.quantize.check_picture import check_picture
from .._comfy import CATEGORY, found_by, show_text
from .._models import file_path, state_of
from . import convert_run
from .quality_check_run import check


class FrugalQualityCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalQualityCheck",
            display_name="Check Quantized Wan Model",
            category=f"{CATEGORY}/quantize",
            description=(
                "Runs a quantised Wan model on model calls that Calibrate Wan Model saved from the "
                "original, and reports how far the outputs differ."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The quantised model, from any loader."),
                io.Combo.Input(
                    "calibration",
                    options=convert_run.files(convert_run.CALIBRATION),
                    default=convert_run.NONE,
                    tooltip="Calibration file recorded from the original model.",
                ),
                io.Combo.Input(
                    "quality_file",
                    options=convert_run.quality_files(),
                    default=convert_run.NONE,
                    tooltip=(
                        "Quality file that Quantize Wan Model wrote next to the model. Its layers "
                        "are shown too, and the results are added to it."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The results as text."),
                io.String.Output("figures", display_name="figures", tooltip="The same as JSON."),
                io.Image.Output(
                    "chart",
                    display_name="chart",
                    tooltip="Error of each call, and of each block if known.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["quality", "quantize", "error", "compare", "snr", "int8", "w4a8"]),
        )

    @classmethod
    def fingerprint_inputs(cls, calibration, **_):
        return (
            ""
            if calibration == convert_run.NONE
            else state_of(file_path(convert_run.CALIBRATION, calibration))
        )

    @classmethod
    def execute(cls, model, calibration, quality_file) -> io.NodeOutput:
        if calibration == convert_run.NONE:
            raise FrugalError(
                "no calibration is chosen",
                "one of the original model",
                "record it with Calibrate Wan Model, then choose it here",
            )
        quality = (
            None if quality_file == convert_run.NONE else convert_run.quality_path(quality_file)
        )
        error, report = check(model, file_path(convert_run.CALIBRATION, calibration), quality)
        text = error.text() if report is None else report.text()
        show_text(cls.hidden.unique_id, text)
        chart = torch.from_numpy(check_picture(error, report).copy()).float()[None] / 255
        return io.NodeOutput(text, json.dumps(error.to_dict()), chart, ui=ui.PreviewText(text))
