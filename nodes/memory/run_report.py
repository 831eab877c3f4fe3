"""The node that says what a run took."""

from __future__ import annotations

import itertools

from comfy_api.v0_0_2 import io

from ...kernels.memory.run_report import RunReport
from .._comfy import CATEGORY, found_by, show_text
from . import run_report_run

RUNS = itertools.count(1)


class FrugalReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalReport",
            display_name="Run Report",
            category=f"{CATEGORY}/memory",
            description=(
                "Measures the run: time, peak memory, frames, what the models hold, and the cost "
                "at your price per hour. Connect the final images so that it waits for the result."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Model to report on: its files and formats.",
                ),
                io.Model.Input("model_2", optional=True, tooltip="A second model to report on."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The final images; the report waits for them and counts them.",
                ),
                io.Float.Input(
                    "price_per_hour",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    tooltip="Price of one hour of this machine. 0 = unknown.",
                ),
                io.String.Input(
                    "currency", default="USD", tooltip="Currency of the price, up to 12 characters."
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.String.Output("data", display_name="data", tooltip="The same numbers as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["cost", "timer", "memory", "vram", "benchmark", "stats"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        # ComfyUI asks all nodes for it when a run starts, before it executes any.
        run_report_run.start_run()
        return next(RUNS)

    @classmethod
    def execute(
        cls, price_per_hour, currency, model=None, model_2=None, images=None
    ) -> io.NodeOutput:
        device = run_report_run.device()
        report = RunReport(
            seconds=run_report_run.METER.seconds(),
            memory=run_report_run.METER.memory(device),
            models=tuple(
                run_report_run.model_facts(each) for each in (model, model_2) if each is not None
            ),
            frames=None if images is None else run_report_run.frames_of(images),
            price_per_hour=price_per_hour,
            currency=currency,
            attention=run_report_run.attention_tables(model, model_2),
        )
        text, data = report.text(), report.json()
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(text, data, ui={"text": (text,), "frugal_report": (data,)})
