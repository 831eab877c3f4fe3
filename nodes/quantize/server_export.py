"""The export of a model for a server as a node."""

from __future__ import annotations

import comfy.model_management
from comfy_api.v0_0_2 import io, ui

from ...kernels.quant.calibration import read_calibration
from ...kernels.quant.gptq_layer import GROUPS
from ...kernels.quant.server_folder import ServerJob
from .._comfy import CATEGORY, known, show_text
from .._models import file_path, fingerprint, model_names, model_path, state_of
from . import glue, server_glue


class FrugalServerExport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalServerExport",
            display_name="Export INT4 for vLLM-Omni (Frugal)",
            category=f"{CATEGORY}/quantize",
            description=(
                "Writes a Wan model as a diffusers folder in INT4 that a vLLM-Omni server loads, "
                "solved with the same calibration as the files for ComfyUI. Cancelled work goes on "
                "when it is queued again."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="The model to export, best one in fp16, bf16 or fp32.",
                ),
                io.Combo.Input(
                    "rest",
                    options=server_glue.folders(),
                    default=glue.NONE,
                    tooltip=(
                        "The same model as a diffusers folder in models/diffusers: its VAE, text "
                        "encoder and so on are taken over. none: only the transformer is written."
                    ),
                ),
                io.Combo.Input(
                    "calibration",
                    options=glue.files(glue.CALIBRATION),
                    default=glue.NONE,
                    tooltip=(
                        "What the layers' inputs look like, from the calibration node. With it, "
                        "values are chosen by GPTQ for the least error of the outputs."
                    ),
                ),
                io.Combo.Input(
                    "group_size",
                    options=[str(group) for group in GROUPS],
                    default=str(GROUPS[-1]),
                    tooltip="Weights that share a scale. 32 is most exact and 5 % larger.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=glue.files("loras"),
                    default=glue.NONE,
                    tooltip="A LoRA to merge before quantising.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="Strength of the LoRA, 1 as trained.",
                ),
                io.String.Input(
                    "folder_name",
                    default="wan_int4",
                    tooltip="Name of the new folder in models/diffusers.",
                ),
            ],
            outputs=[
                io.String.Output("folder", tooltip="Full path of the folder, for the server."),
                io.String.Output("report", tooltip="Size, error of the weights, what is missing."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **known(
                io.Schema, search_aliases=["vllm", "gptq", "autoround", "int4", "diffusers", "save"]
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, calibration, lora_name, **_):
        beside = ((glue.CALIBRATION, calibration), ("loras", lora_name))
        paths = [file_path(kind, name) for kind, name in beside if name != glue.NONE]
        return f"{fingerprint(model_name)};{state_of(*paths)}"

    @classmethod
    def execute(
        cls, model_name, rest, calibration, group_size, lora_name, lora_strength, folder_name
    ) -> io.NodeOutput:
        folder = server_glue.output_folder(folder_name)
        loras = []
        if lora_name != glue.NONE:
            loras.append((file_path("loras", lora_name), lora_strength))
        known_inputs = None
        if calibration != glue.NONE:
            known_inputs = read_calibration(file_path(glue.CALIBRATION, calibration))
        job = ServerJob(
            model_path(model_name),
            folder,
            server_glue.folder_path(rest),
            int(group_size),
            known_inputs,
            comfy.model_management.get_torch_device(),
        )
        report = server_glue.write(job, loras, lambda text: show_text(cls.hidden.unique_id, text))
        text = report.text()
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(str(folder), text, ui=ui.PreviewText(text))
