"""The node that applies a LoRA without merging it."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from .._models import file_path, offered, state_of
from . import apply, file


class FrugalLoraSide(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoraSide",
            display_name="Apply LoRA Without Merging",
            category=f"{CATEGORY}/lora",
            description=(
                "Adds a LoRA to the outputs of a model's layers instead of merging it into their "
                "weights: quantised weights are not rounded again, LoRAs stack in any order, and a "
                "new strength does not reload the model. Reports which keys of the file were "
                "applied and which were not."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A video model in any format: fp8, int8, 4 bits, bf16.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras: LoRA, LoHa, LoKr, or DoRA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="LoRA strength. 0 leaves the model unchanged, to the bit.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_lora", display_name="model", tooltip="The model with this LoRA."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How many keys were applied, and which were not, with reasons.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "lora",
                    "lora loader",
                    "lora bypass",
                    "lokr",
                    "dora",
                    "lightning",
                    "lightx2v",
                    "4 step",
                    "4 steps lora",
                    "distill",
                    "fp8 lora",
                ],
                "FrugalLoraSide",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, model, lora_name, strength):
        return state_of(file_path("loras", lora_name))

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return offered(lora_name, folder_paths.get_filename_list("loras"), "models/loras")

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        path = file_path("loras", lora_name)
        changed, report = apply.apply(model, file.read(path, model.model), strength)
        show_text(cls.hidden.unique_id, report.text())
        return io.NodeOutput(changed, report.text())
