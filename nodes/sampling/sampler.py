"""The sampler people drop in for ComfyUI's KSampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.v0_0_2 import io

from ...kernels.sampling.presets import PRESETS
from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from . import sampler_run
from .preview import AS_SET, MIDDLE_FRAME


class FrugalSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalSampler",
            display_name="Sampler with Presets",
            category=f"{CATEGORY}/sampling",
            description=(
                "ComfyUI's KSampler with presets that save work: the fastest attention, a step "
                "cache, guidance only where it matters. With preset off the result equals "
                "KSampler's to the bit. Reports what was skipped and the time taken."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model, with its LoRAs already applied."),
                io.Conditioning.Input("positive", tooltip="Positive prompt."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="off",
                    tooltip=(
                        "off: KSampler, to the bit. quality: fastest exact attention, cautious "
                        "step cache. balanced, draft: more skipped calls, guidance off for the "
                        "last 20 % or 40 %. distilled: cfg 1, for models made for 4 to 8 steps."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input("steps", default=30, min=1, max=10000, tooltip="Number of steps."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; 1 ignores the negative prompt and halves the work.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="Sampling method, as in KSampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="Noise schedule, as in KSampler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Amount of denoising; below 1 starts from the latent with less noise "
                        "(image to image)."
                    ),
                ),
                io.Combo.Input(
                    "preview",
                    options=[AS_SET, MIDDLE_FRAME],
                    default=AS_SET,
                    tooltip="Preview image of each step on the node.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "compile_blocks",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Wan models: compile the blocks with torch.compile; offloading keeps "
                        "working. The first step takes longer, later ones less."
                    ),
                    **ADVANCED,
                ),
                io.Model.Input(
                    "first_model",
                    optional=True,
                    tooltip=(
                        "Preset distilled: the same model without the distillation LoRA. It runs "
                        "the first steps at cfg, against slow motion; the rest runs at cfg 1."
                    ),
                ),
                io.Int.Input(
                    "first_steps",
                    default=1,
                    min=1,
                    max=10000,
                    optional=True,
                    # A socket: most graphs have no use for one more box.
                    force_input=True,
                    tooltip="Steps that first_model runs. Not connected = 1.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The finished latent."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was skipped and the time taken, as text.",
                ),
                io.String.Output("data", display_name="data", tooltip="The same numbers as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "ksampler",
                    "fast sampler",
                    "turbo",
                    "speed up",
                    "cfg",
                    "4 step",
                    "4 steps",
                    "lightning",
                    "lcm",
                    "save vram",
                    "fast",
                ],
                "FrugalSampler",
            ),
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, preset, seed, steps, cfg, sampler_name,
        scheduler, denoise, preview, compile_blocks=False, first_model=None, first_steps=1,
    ) -> io.NodeOutput:  # fmt: skip
        job = sampler_run.Job(
            seed, steps, cfg, sampler_name, scheduler, denoise, preset,
            preview == MIDDLE_FRAME, compile_blocks, first_steps,
        )  # fmt: skip
        latent, report = sampler_run.run(model, positive, negative, latent_image, job, first_model)
        show_text(cls.hidden.unique_id, report.text())
        return io.NodeOutput(latent, report.text(), report.json())
