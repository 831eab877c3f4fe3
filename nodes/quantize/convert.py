"""The converter as a node."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.v0_0_2 import io, ui

from ...kernels.formats import table
from ...kernels.quantize.quality_picture import picture
from ...kernels.quantize.request import Job, budget_bytes
from .._comfy import CATEGORY, found_by, show_text
from .._models import model_names, model_offered, model_path
from . import convert_run
from .common_inputs import calibration_input, calibration_path, lora_inputs, loras, state

BUDGET = "target size"
ENDINGS = {
    table.BF16: "bf16",
    table.FP8: "fp8",
    table.INT8: "int8_convrot",
    table.W4A8: "w4a8",
    table.W4A8_G64: "w4a8_g64",
    table.AWQ: "awq_w4a16",
}
# Formats that a budget may choose besides bf16, and where their products are fast.
ALLOW = {
    "allow_int8": (table.INT8, True, "1 byte per weight; fast on RTX 20 and newer."),
    "allow_fp8": (table.FP8, False, "1 byte per weight, less accurate than int8; any card."),
    "allow_w4a8": (table.W4A8, True, "0.57 byte per weight; fast on RTX 30 and newer."),
    "allow_w4a8_g64": (table.W4A8_G64, False, "0.52 byte per weight; fast on RTX 30 and newer."),
    "allow_awq": (table.AWQ, False, "0.56 byte per weight; built into ComfyUI from 0.38 on."),
}


class FrugalQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalQuantize",
            display_name="Quantize Wan Model",
            category=f"{CATEGORY}/quantize",
            description=(
                "Writes a Wan model as one safetensors file in ComfyUI's own quantised formats, in "
                "one format or mixed to reach a target size. The file loads in ComfyUI without "
                "this pack. Only one layer at a time is in memory; interrupted work resumes when "
                "it is queued again."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="The model to convert, preferably in fp16, bf16 or fp32.",
                ),
                io.Combo.Input(
                    "format",
                    options=[*table.TARGETS, BUDGET],
                    default=table.INT8,
                    tooltip=(
                        "Format of the large layers. With 'target size', each layer gets one of "
                        "the allowed formats, for the smallest error at that size."
                    ),
                ),
                io.Float.Input(
                    "size_gb",
                    default=9.0,
                    min=0.001,
                    max=200.0,
                    step=0.1,
                    tooltip="Size of all weights in GB (10^9 bytes); used with 'target size'.",
                ),
                *(
                    io.Boolean.Input(
                        name,
                        default=default,
                        tooltip=f"With 'target size': {label} may be used. {text}",
                    )
                    for name, (label, default, text) in ALLOW.items()
                ),
                calibration_input("values are chosen for the least error of the outputs."),
                *lora_inputs(),
                io.Boolean.Input(
                    "measure",
                    default=True,
                    tooltip="Compare each quantised layer with its source, for the report.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="wan",
                    tooltip="Start of the file name in models/diffusion_models.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace an existing file of this name."
                ),
            ],
            outputs=[
                io.String.Output(
                    "file_name",
                    display_name="file_name",
                    tooltip="Name of the file as loaders list it.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Sizes, formats, errors and changes.",
                ),
                io.Image.Output(
                    "chart",
                    display_name="chart",
                    tooltip="Error and size of every block; black if nothing was measured.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                ["quantize", "convert", "int8", "fp8", "w4a8", "awq", "gptq"], "FrugalQuantize"
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, calibration, lora_name, **_):
        return state(model_name, calibration, lora_name)

    @classmethod
    def validate_inputs(cls, model_name=None):
        return model_offered(model_name)

    @classmethod
    def execute(
        cls,
        model_name,
        format,
        size_gb,
        calibration,
        lora_name,
        lora_strength,
        measure,
        filename_prefix,
        overwrite,
        **allowed,
    ) -> io.NodeOutput:
        ending = f"{size_gb:g}GB" if format == BUDGET else ENDINGS[format]
        path = convert_run.output_path(filename_prefix, ending)
        job = Job(
            model_path(model_name),
            path,
            None if format == BUDGET else format,
            budget_bytes(size_gb),
            (table.BF16, *(label for name, (label, *_) in ALLOW.items() if allowed[name])),
            calibration_path(calibration),
            comfy.model_management.get_torch_device(),
            overwrite,
            measure,
        )
        merged = loras(lora_name, lora_strength)
        outcome = convert_run.convert(
            job, merged, lambda text: show_text(cls.hidden.unique_id, text)
        )
        text = outcome.text()
        show_text(cls.hidden.unique_id, text)
        chart = torch.zeros(1, 64, 64, 3)
        if outcome.quality is not None:
            chart = torch.from_numpy(picture(outcome.quality).copy()).float()[None] / 255
        return io.NodeOutput(convert_run.listed(path), text, chart, ui=ui.PreviewText(text))
