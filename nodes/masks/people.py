"""Nodes that make masks from a human parser's label maps."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.masks import agnostic, labels
from .._comfy import found_by, show_text
from .._preview import preview
from . import common_inputs, glue

ENCODING = (
    "How the image encodes the labels. auto: detected, and refused if unknown. grey level: the "
    "label itself. grey x 24 / 255: DensePose spread over 0..255. VOC colours: the usual palette "
    "of human parsers. viridis, parula: coloured DensePose."
)


class FrugalMaskFromLabels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskFromLabels",
            display_name="Mask from Label Map",
            category=common_inputs.FAMILY,
            description=(
                "Selects parts of a label map (ATR, LIP, DensePose, plain numbers) or colours of a "
                "colour map as a mask."
            ),
            inputs=[
                io.Image.Input(
                    "labels",
                    tooltip="Label map: one flat grey or colour per part, without smoothing.",
                ),
                io.Combo.Input(
                    "map",
                    options=[*labels.MAPS, "colours"],
                    default="ATR",
                    tooltip=(
                        "Meaning of the labels. numbers: no names, 0 to 255. colours: select "
                        "pixels by colour."
                    ),
                ),
                io.String.Input(
                    "parts",
                    default="Upper-clothes, Dress",
                    tooltip=(
                        "Names or numbers, separated by commas: Upper-clothes, Arm, 7-9; for "
                        "colours #ff0000. Arm selects both the left and the right one."
                    ),
                ),
                io.Combo.Input(
                    "encoding", options=list(labels.ENCODINGS), default="auto", tooltip=ENCODING
                ),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip=("1 on the selected parts."))
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                [
                    "segmentation to mask",
                    "atr",
                    "lip",
                    "densepose",
                    "colour to mask",
                ]
            ),
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        made, line = glue.mask_of_labels(**inputs)
        show_text(cls.hidden.unique_id, line)
        return io.NodeOutput(made, ui=preview(made))


class FrugalClothMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalClothMask",
            display_name="Cloth Mask (agnostic)",
            category=common_inputs.FAMILY,
            description=(
                "CatVTON's mask of the area to repaint, from label maps of a person: the old "
                "garment and everything that shows its shape, with face, hair, hands and other "
                "clothes protected."
            ),
            inputs=[
                io.Combo.Input(
                    "part",
                    options=list(agnostic.PARTS),
                    default="upper",
                    tooltip="Garment to replace. inner: under an open coat. outer: the coat only. "
                    "Both need a LIP map: ATR has no class for coats.",
                ),
                io.Image.Input(
                    "densepose",
                    optional=True,
                    tooltip="DensePose label map. Without it hands and feet are not protected.",
                ),
                io.Image.Input(
                    "lip", optional=True, tooltip="LIP label map (20 labels) of the same size."
                ),
                io.Image.Input(
                    "atr", optional=True, tooltip="ATR label map (18 labels) of the same size."
                ),
                io.Combo.Input(
                    "hull",
                    options=list(agnostic.HULLS),
                    default="per_region",
                    tooltip=(
                        "per_region: as CatVTON, a convex hull around each region. closing: closes "
                        "gaps narrower than twice the radius, so the space between arm and body "
                        "can stay. off: neither."
                    ),
                ),
                common_inputs.closing_radius(),
                io.Int.Input(
                    "dilate",
                    default=0,
                    min=0,
                    max=agnostic.MAX_DILATE,
                    tooltip=(
                        "Side in pixels (odd) of the square that dilates the mask. 0 = longest "
                        "side / 250, as CatVTON."
                    ),
                ),
                io.Int.Input(
                    "blur",
                    default=0,
                    min=0,
                    max=agnostic.MAX_BLUR,
                    tooltip=(
                        "Width in pixels (odd) of the blur that rounds the mask. 0 = longest side "
                        "/ 25, as CatVTON."
                    ),
                ),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="1 where to repaint.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                [
                    "catvton mask",
                    "automasker",
                    "cloth mask",
                    "try-on mask",
                    "auto mask",
                    "clothes mask",
                ],
                "FrugalClothMask",
            ),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(
        cls, part, hull, radius, dilate, blur, densepose=None, lip=None, atr=None
    ) -> io.NodeOutput:
        chosen = agnostic.AgnosticSettings(part, hull, radius, dilate, blur)
        show_text(cls.hidden.unique_id, glue.PREPARING)
        made, line = glue.agnostic_mask(densepose, lip, atr, chosen)
        show_text(cls.hidden.unique_id, line)
        return io.NodeOutput(made, ui=preview(made))
