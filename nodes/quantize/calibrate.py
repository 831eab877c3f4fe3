"""The calibration node."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io

from ...kernels.errors import FrugalError
from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from . import convert_run
from .calibrate_run import Settings, wrap

ADD, REPLACE = "add to it", "replace it"


class FrugalCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCalibrate",
            display_name="Calibrate Wan Model",
            category=f"{CATEGORY}/quantize",
            description=(
                "Records the inputs of a Wan model's layers while your own workflow samples, as "
                "calibration data for Quantize Wan Model. Put it between the model and the sampler "
                "and queue once: the file is written when sampling ends. The result is unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Wan model, preferably in fp16 or bf16."),
                io.String.Input(
                    "name",
                    default="wan",
                    tooltip="Name of the file in models/calibration, without extension.",
                ),
                io.Combo.Input(
                    "if_it_exists",
                    options=[ADD, REPLACE],
                    default=ADD,
                    tooltip=(
                        "What to do if the file exists. Queue several prompts and seeds with 'add "
                        "to it' for more variety."
                    ),
                ),
                io.Float.Input(
                    "memory_gb",
                    default=8.0,
                    min=0.01,
                    max=500.0,
                    step=0.5,
                    tooltip=(
                        "Main memory in GB (10^9 bytes) for the statistics while sampling. More "
                        "keeps more detail and makes the file larger."
                    ),
                    **ADVANCED,
                ),
                io.Int.Input(
                    "rows_per_call",
                    default=2048,
                    min=16,
                    max=1_000_000,
                    tooltip="Tokens recorded per model call; the rest are skipped.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31,
                    tooltip=(
                        "Seed that selects the recorded tokens; it does not change the result."
                    ),
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "measure_layers",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Also measure each layer's sensitivity, for a better choice under a target "
                        "size. Runs the model once per linear layer on a small crop in the middle "
                        "of sampling."
                    ),
                ),
                io.Boolean.Input(
                    "keep_calls",
                    default=True,
                    optional=True,
                    tooltip=(
                        "Also save three model calls on a small crop for Check Quantized Wan "
                        "Model: three more short runs. Turn off if another node fails on cropped "
                        "inputs."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "recorded_model",
                    display_name="recorded_model",
                    tooltip="The model, for the sampler.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(["calibrate", "gptq", "imatrix", "hessian", "statistics"]),
        )

    @classmethod
    def execute(
        cls,
        model,
        name,
        if_it_exists,
        memory_gb,
        rows_per_call,
        seed,
        measure_layers=False,
        keep_calls=True,
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        settings = Settings(
            calibration_path(name),
            if_it_exists == ADD,
            int(memory_gb * 10**9),
            rows_per_call,
            seed,
            lambda text: show_text(node, text),
            measure_layers,
            keep_calls,
        )
        return io.NodeOutput(wrap(model, settings))


def calibration_path(name: str) -> Path:
    """Where a calibration called `name` is written. Raises FrugalError for a name that is empty or
    leads out of the folder.
    """
    folder = Path(folder_paths.get_folder_paths(convert_run.CALIBRATION)[0]).resolve()
    path = (
        folder / f"{name.strip().removesuffix(convert_run.SUFFIX)}{convert_run.SUFFIX}"
    ).resolve()
    if not path.name.removesuffix(convert_run.SUFFIX) or folder not in path.parents:
        raise FrugalError(
            f"the name {ascii(name)[:60]}",
            f"a file name inside models/{convert_run.CALIBRATION}",
            "type a plain name",
        )
    return path
