"""The export of a model for a server as a node."""

from __future__ import annotations

import comfy.model_management
from comfy_api.v0_0_2 import io, ui

from ...kernels.quantize.calibration import read_calibration
from ...kernels.quantize.gptq_layer import GROUPS
from ...kernels.quantize.vllm_folder import ServerJob
from .._comfy import CATEGORY, found_by, show_text
from .._models import model_names, model_offered, model_path
from . import convert_run, export_run
from .common_inputs import calibration_input, calibration_path, lora_inputs, loras, state


class FrugalServerExport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalServerExport",
            display_name="Export INT4 for vLLM-Omni",
            category=f"{CATEGORY}/quantize",
            description=(
                "Exports a Wan model as an INT4 diffusers folder for a vLLM-Omni server, with the "
                "same calibration data as the files for ComfyUI. Interrupted work resumes when it "
                "is queued again."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="The model to export, preferably in fp16, bf16 or fp32.",
                ),
                io.Combo.Input(
                    "diffusers_folder",
                    options=export_run.folders(),
                    default=convert_run.NONE,
                    tooltip=(
                        "The same model as a diffusers folder in models/diffusers, from which VAE, "
                        "text encoder and the other parts are taken. none = write only the "
                        "transformer."
                    ),
                ),
                calibration_input("values are chosen by GPTQ for the least error of the outputs."),
                io.Combo.Input(
                    "group_size",
                    options=[str(group) for group in GROUPS],
                    default=str(GROUPS[-1]),
                    tooltip="Weights per scale. 32 is the most accurate and 5 % larger.",
                ),
                *lora_inputs(),
                io.String.Input(
                    "folder_name",
                    default="wan_int4",
                    tooltip="Name of the new folder in models/diffusers.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "folder",
                    display_name="folder",
                    tooltip="Full path of the folder, for the server.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Size, error of the weights, and what is missing.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["vllm", "gptq", "autoround", "int4", "diffusers", "save"]),
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
        diffusers_folder,
        calibration,
        group_size,
        lora_name,
        lora_strength,
        folder_name,
    ) -> io.NodeOutput:
        folder = export_run.output_folder(folder_name)
        recorded = calibration_path(calibration)
        job = ServerJob(
            model_path(model_name),
            folder,
            export_run.folder_path(diffusers_folder),
            int(group_size),
            None if recorded is None else read_calibration(recorded),
            comfy.model_management.get_torch_device(),
        )
        report = export_run.write(
            job,
            loras(lora_name, lora_strength),
            lambda text: show_text(cls.hidden.unique_id, text),
        )
        text = report.text()
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(str(folder), text, ui=ui.PreviewText(text))
