"""The node that tells clothes, skin and hair apart."""

from __future__ import annotations

import importlib.util

from comfy_api.v0_0_2 import io

from ...kernels.log import LOG
from ...kernels.tryon import parsing
from .._comfy import found_by, show_text
from .._models import offered
from .._preview import preview
from . import common_inputs, parse_run

parse_run.register_folder()


class FrugalHumanParse(io.ComfyNode):
    """Photo to label map."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalHumanParse",
            display_name="Human Parse",
            category=common_inputs.FAMILY,
            description=(
                "Segments clothes, skin, hair and background of a photo with a Segformer parser "
                "from models/human_parsing. Nothing is downloaded."
            ),
            inputs=[
                io.Image.Input("image", tooltip="Photos of persons, any size."),
                io.Combo.Input(
                    "parser",
                    options=parse_run.choices(),
                    tooltip="Folder under models/human_parsing with config.json and "
                    "model.safetensors, such as segformer_b2_clothes or fashn-human-parser.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "labels",
                    display_name="labels",
                    tooltip="Label map as grey levels (label / 255), in the order of the map named "
                    "below; for 'Cloth Mask' and 'Mask from Label Map'.",
                ),
                io.Image.Output(
                    "body",
                    display_name="body (DensePose)",
                    tooltip=(
                        "Hands, feet, arms, legs and torso with DensePose's labels, if the parser "
                        "distinguishes them (FASHN); else empty."
                    ),
                ),
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The photo with coloured labels."
                ),
                io.String.Output(
                    "map",
                    display_name="map",
                    tooltip="Name of the label order: ATR, LIP, or numbers (the parser's own).",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(
                ["segformer", "human parsing", "clothes segmentation", "atr", "lip", "auto mask"],
                "FrugalHumanParse",
            ),
        )

    @classmethod
    def validate_inputs(cls, parser=None):
        return offered(parser, parse_run.choices(), f"models/{parse_run.KIND}", parse_run.PAGE)

    @classmethod
    def execute(cls, image, parser):
        labels, body, name, how = parse_run.parse(parse_run.folder_of(parser), image)
        show_text(cls.hidden.unique_id, how)
        shown = parse_run.overlay(image, labels)
        pictures = (parsing.as_picture(labels), parsing.as_picture(body), shown)
        return io.NodeOutput(*pictures, name, ui=preview(shown))


NODES: list[type[io.ComfyNode]] = []
if importlib.util.find_spec("transformers"):
    NODES.append(FrugalHumanParse)
else:
    LOG.warning("[Frugal] Human Parse is off: install 'transformers' to get it.")
