"""The node that encodes prompts and keeps what it encoded."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import CATEGORY, found_by, show_text
from .._models import WAN_PAGE, offered
from . import cached_encode_run


class FrugalCachedTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalCachedTextEncode",
            display_name="Encode Wan Prompts (Cached)",
            category=f"{CATEGORY}/wan",
            description=(
                "Encodes both prompts of a Wan graph and caches the result on disk. The text "
                "encoder (6.7 GB) is loaded only when a prompt is new, and freed afterwards."
            ),
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=cached_encode_run.names(),
                    tooltip="An umT5-XXL file in models/text_encoders.",
                ),
                io.String.Input(
                    "positive_text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video should show.",
                ),
                io.String.Input(
                    "negative_text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video should not show.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(cached_encode_run.DEVICES),
                    default=cached_encode_run.DEVICES[0],
                    optional=True,
                    tooltip="Where a new prompt is encoded. cpu: no GPU memory, but slower.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The positive prompt, encoded."
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="The negative prompt, encoded."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What came from the cache and what was encoded.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                [
                    "clip text encode",
                    "prompt cache",
                    "umt5",
                    "text encoder",
                    "t5",
                    "wan prompt",
                    "clip text encode wan",
                ],
                "FrugalCachedTextEncode",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name, **_):
        return cached_encode_run.fingerprint(encoder_name)

    @classmethod
    def validate_inputs(cls, encoder_name=None):
        folder = f"models/{cached_encode_run.FOLDER}"
        return offered(encoder_name, cached_encode_run.names(), folder, WAN_PAGE)

    @classmethod
    def execute(
        cls, encoder_name, positive_text, negative_text, device=cached_encode_run.DEVICES[0]
    ) -> io.NodeOutput:
        path = cached_encode_run.encoder_path(encoder_name)
        positive, negative = cached_encode_run.encode(path, [positive_text, negative_text], device)
        report = f"positive: {positive.source}\nnegative: {negative.source}"
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(positive.conditioning, negative.conditioning, report)
