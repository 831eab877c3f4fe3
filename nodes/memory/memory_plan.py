"""The node that counts a run's memory before it starts, and makes it fit."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.v0_0_2 import io

from ...kernels.memory.plan_picture import picture
from .._comfy import CATEGORY, found_by, runs_negative, show_text
from . import memory_plan_run


class FrugalMemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMemoryPlan",
            display_name="Memory Plan",
            category=f"{CATEGORY}/memory",
            description=(
                "Predicts the memory of a Wan run, phase by phase, before it starts; reports "
                "whether it fits, and enables only the options needed to fit. The video stays the "
                "same."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip=("A Wan model, with LoRAs and shift already applied.")
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip=("Connect it to include decoding in the plan.")
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=("Connect it to include the text encoder in the plan."),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "Latent of the run: size, frames and batch are taken from it instead of "
                        "the numbers."
                    ),
                ),
                io.Int.Input(
                    "width", default=832, min=16, max=8192, step=16, tooltip="Width in px."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=8192, step=16, tooltip="Height in px."
                ),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=1,
                    max=8192,
                    step=4,
                    tooltip=("Number of video frames."),
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos per batch."),
                io.Boolean.Input(
                    "guidance",
                    default=True,
                    tooltip=(
                        "On: cfg above 1, two forward passes per step. Off: cfg 1, one forward "
                        "pass."
                    ),
                ),
                io.Float.Input(
                    "budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Memory the run may use, in GB (10^9 bytes). 0 = all that is free.",
                ),
                io.Int.Input(
                    "frames_per_block",
                    default=3,
                    min=1,
                    max=64,
                    optional=True,
                    # A socket: most graphs have no use for one more box.
                    force_input=True,
                    tooltip=(
                        "Causal models only: latent frames per block, as in the sampler. Not "
                        "connected = 3."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "planned_model",
                    display_name="planned_model",
                    tooltip="The model with the plan applied.",
                ),
                io.String.Output("report", display_name="report", tooltip="The plan as text."),
                io.String.Output("data", display_name="data", tooltip="The same numbers as JSON."),
                io.Image.Output(
                    "chart", display_name="chart", tooltip="Bar chart of the memory by phase."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                [
                    "vram",
                    "out of memory",
                    "oom",
                    "block swap",
                    "offload",
                    "chunk feed forward",
                    "low vram",
                    "save vram",
                    "blockswap",
                    "vram management",
                    "memory",
                ],
                "FrugalMemoryPlan",
            ),
        )

    @classmethod
    def execute(
        cls,
        model,
        width,
        height,
        frames,
        batch_size,
        guidance,
        budget_gb,
        vae=None,
        clip=None,
        latent=None,
        frames_per_block=3,
    ) -> io.NodeOutput:
        guided = guidance or runs_negative(model, 1.0)
        job = memory_plan_run.job_of(latent, width, height, frames, batch_size, guided)
        plan, peaks = memory_plan_run.plan_of(model, job, budget_gb, vae, clip, frames_per_block)
        node = cls.hidden.unique_id
        planned = memory_plan_run.apply(model, plan, peaks, bool(budget_gb), node)
        text, data = plan.text(), plan.json()
        chart = torch.from_numpy(picture(plan).astype(np.float32) / 255)[None]
        show_text(node, text)
        return io.NodeOutput(
            planned, text, data, chart, ui={"text": (text,), "frugal_memory_plan": (data,)}
        )
