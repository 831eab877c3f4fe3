"""Refine Mask, and the list of all mask nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.masks.settings import TEMPORAL, RefineSettings
from .._comfy import found_by, show_text
from .._preview import preview
from . import common_inputs, glue
from .edit import (
    FrugalMaskClean,
    FrugalMaskFeather,
    FrugalMaskGrow,
    FrugalMaskHull,
    FrugalMaskTemporal,
)
from .people import FrugalClothMask, FrugalMaskFromLabels
from .pictures import FrugalMaskBBoxCrop, FrugalMaskBBoxUncrop, FrugalMaskComposite


class FrugalMaskRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskRefine",
            display_name="Refine Mask",
            category=common_inputs.FAMILY,
            description=(
                "Cleans, grows and feathers a mask or a clip of masks in one pass, in exact px. "
                "Order: smoothing over time, threshold, fill holes, drop islands, grow, feather."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip=common_inputs.MASK),
                common_inputs.threshold(
                    "A pixel is inside where its value is above this. 0 keeps grey values."
                ),
                *common_inputs.regions(fill_holes=0, drop_islands=0),
                *common_inputs.growth(
                    0,
                    "disk: exact Euclidean distance. diamond: as ComfyUI's Grow Mask with tapered "
                    "corners. square: as Grow Mask without.",
                ),
                *common_inputs.soft_edge(
                    0.0,
                    "Soft edge in px: length of the ramp, or sigma of gaussian. 0 = off.",
                    "ramp_out: full inside, fades outside. ramp_in: fades inside. ramp_center: "
                    "half on either side. gaussian: blur, the only one for grey masks (threshold "
                    "0).",
                ),
                io.Combo.Input(
                    "temporal",
                    options=list(TEMPORAL),
                    default=TEMPORAL[0],
                    tooltip=(
                        "Flicker reduction, before all other steps. ema: exponential moving "
                        "average. ema_both: ema forwards and backwards, without lag. median3, "
                        "median5: median over 3 or 5 frames. union: every frame gets the union of "
                        "all frames."
                    ),
                ),
                common_inputs.share(
                    "temporal_strength",
                    "For ema and ema_both: weight of the previous frame, 0 to 0.99.",
                ),
            ],
            outputs=[
                io.Mask.Output("refined", display_name="mask", tooltip="The refined mask."),
                io.Mask.Output(
                    "inverted", display_name="inverted", tooltip="1 minus the refined mask."
                ),
                io.Int.Output(
                    "x",
                    display_name="x",
                    tooltip="Left edge in pixels of the box around the mask in all frames.",
                ),
                io.Int.Output("y", display_name="y", tooltip="Top edge in pixels of that box."),
                io.Int.Output(
                    "width",
                    display_name="width",
                    tooltip="Width in pixels of that box; 0 if the mask is empty.",
                ),
                io.Int.Output(
                    "height",
                    display_name="height",
                    tooltip="Height in pixels of that box; 0 if the mask is empty.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                [
                    "grow mask",
                    "expand mask",
                    "feather mask",
                    "blur mask",
                    "fill holes",
                    "remove islands",
                    "mask flicker",
                    "erode",
                    "dilate",
                ],
                "FrugalMaskRefine",
            ),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, **settings) -> io.NodeOutput:
        chosen = RefineSettings(**settings)
        show_text(cls.hidden.unique_id, glue.PREPARING)
        refined, inverted, box, text = glue.refine_mask(mask, chosen)
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(refined, inverted, *box, ui=preview(refined))


NODES = [
    FrugalMaskRefine,
    FrugalMaskGrow,
    FrugalMaskFeather,
    FrugalMaskClean,
    FrugalMaskHull,
    FrugalMaskTemporal,
    FrugalMaskComposite,
    FrugalMaskBBoxCrop,
    FrugalMaskBBoxUncrop,
    FrugalMaskFromLabels,
    FrugalClothMask,
]
