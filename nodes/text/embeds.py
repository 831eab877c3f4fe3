"""The nodes that save text embeddings and load them."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from .._comfy import CATEGORY, found_by
from .._models import offered
from .._output import prefix_problem
from . import embed_files


class FrugalSaveTextEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalSaveTextEmbeds",
            display_name="Save Text Embeddings",
            category=f"{CATEGORY}/wan",
            description=(
                "Saves a text conditioning to output/text_embeds, bit for bit, so that later "
                "graphs run without the text encoder (6.7 GB for Wan)."
            ),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="Output of a text encode node."),
                io.String.Input(
                    "filename_prefix",
                    default="prompt",
                    tooltip="Start of the file name; a number is added, no file is overwritten.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            **found_by(["save conditioning", "text embeds", "prompt cache"]),
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem(embed_files.FOLDER, filename_prefix)

    @classmethod
    def execute(cls, conditioning, filename_prefix) -> io.NodeOutput:
        path = embed_files.save(conditioning, filename_prefix)
        return io.NodeOutput(ui=ui.PreviewText(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"))


class FrugalLoadTextEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadTextEmbeds",
            display_name="Load Text Embeddings",
            category=f"{CATEGORY}/wan",
            description="Loads a saved text conditioning, or a single tensor [1, tokens, width].",
            inputs=[
                io.Combo.Input(
                    "embeds_name",
                    options=embed_files.names(),
                    tooltip="A file in models/text_embeds, or in output/text_embeds [output].",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning",
                    tooltip="The conditioning as it was saved, bit for bit.",
                ),
            ],
            **found_by(["load conditioning", "text embeds", "prompt cache"]),
        )

    @classmethod
    def validate_inputs(cls, embeds_name=None):
        return offered(embeds_name, embed_files.names(), embed_files.PLACES)

    @classmethod
    def fingerprint_inputs(cls, embeds_name):
        return embed_files.fingerprint(embeds_name)

    @classmethod
    def execute(cls, embeds_name) -> io.NodeOutput:
        return io.NodeOutput(embed_files.load(embeds_name))
