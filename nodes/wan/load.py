"""The node that loads a Wan model."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.checkpoints.matmul_precision import AUTO
from ...kernels.checkpoints.matmul_precision import CHOICES as PRODUCTS
from ...kernels.quantize.on_load import AS_STORED, CHOICES
from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from .._models import fingerprint, model_names, model_offered, model_path
from . import load_run


class FrugalLoadWan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadWan",
            display_name="Load Wan Model",
            category=f"{CATEGORY}/wan",
            description=(
                "Loads a Wan video model from any public layout: fp32, fp16, bf16, "
                "fp8 with or without "
                "scales, int8, GPTQ, AWQ, GGUF, ComfyUI's own quantised formats, diffusers "
                "names, and models split into parts. Can quantise an unquantised model. "
                "Refuses what it cannot load correctly, and says why."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A file in models/diffusion_models, or the index of a split model.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(load_run.WEIGHT_DTYPES),
                    default=load_run.DEFAULT,
                    tooltip=(
                        "Data type of an unquantised model. default: what ComfyUI picks for this "
                        "device; quantised files need default. GGUF stays packed with default, "
                        "and is unpacked to any other type."
                    ),
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "quantize",
                    options=list(CHOICES),
                    default=AS_STORED,
                    optional=True,
                    tooltip=(
                        "Quantise the large layers of an fp32, fp16 or bf16 file while it loads. "
                        "fp8 per-channel and int8 ConvRot: 1 byte per weight; W4A8: 0.57 byte."
                    ),
                ),
                io.Combo.Input(
                    "matmul",
                    options=list(PRODUCTS),
                    default=AUTO,
                    optional=True,
                    tooltip=(
                        "How quantised layers multiply. full precision: dequantised to the compute "
                        "type, most accurate. low precision: in their own format, activations "
                        "rounded per token; fp8 needs compute capability 8.9. auto: full for fp8, "
                        "ComfyUI's own kernels for int8 and 4 bits."
                    ),
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The video model, for any sampler."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What the file holds and how it was loaded.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "wan",
                    "load diffusion model",
                    "fp8",
                    "int8",
                    "gguf",
                    "unet loader",
                    "wan i2v",
                    "wan t2v",
                    "load gguf",
                    "unet loader gguf",
                    "wan 2.1",
                ],
                "FrugalLoadWan",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype, quantize=AS_STORED, matmul=AUTO):
        return fingerprint(model_name)

    @classmethod
    def validate_inputs(cls, model_name=None):
        return model_offered(model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype, quantize=AS_STORED, matmul=AUTO) -> io.NodeOutput:
        path = model_path(model_name)
        patcher, report = load_run.load_wan(path, weight_dtype, quantize, matmul)
        show_text(cls.hidden.unique_id, report.text())
        return io.NodeOutput(patcher, report.text())
