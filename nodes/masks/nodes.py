"""Refine Mask, and the list of all mask nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ...kernels.masks.settings import (
    FEATHERS,
    MAX_FEATHER,
    MAX_RADIUS,
    MAX_REGIONS,
    SHAPES,
    TEMPORAL,
    RefineSettings,
)
from .._comfy import CATEGORY, known, show_text
from . import glue
from .edit import (
    MAX_AREA,
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
            category=f"{CATEGORY}/masks",
            description=(
                "Cleans, grows and feathers a mask or a clip of masks in one pass, in exact px. "
                "Order: smoothing over time, threshold, fill holes, drop islands, grow, feather."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip="One mask or a clip of masks; it is not changed."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A pixel is inside where its value is above this. 0 keeps grey values.",
                ),
                io.Int.Input(
                    "fill_holes",
                    default=0,
                    min=-1,
                    max=MAX_AREA,
                    tooltip=(
                        "Fills enclosed holes of at most this many pixels (area). 0: off, -1: all. "
                        "Gaps that reach the picture border are not holes."
                    ),
                ),
                io.Int.Input(
                    "drop_islands",
                    default=0,
                    min=0,
                    max=MAX_AREA,
                    tooltip="Removes regions smaller than this many pixels (area). 0: off.",
                ),
                io.Int.Input(
                    "keep_largest",
                    default=0,
                    min=0,
                    max=MAX_REGIONS,
                    tooltip="Keeps only this many of the largest regions in each frame. 0: all.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-MAX_RADIUS,
                    max=MAX_RADIUS,
                    tooltip="Radius in pixels by which the mask grows; negative shrinks it.",
                ),
                io.Combo.Input(
                    "grow_shape",
                    options=list(SHAPES),
                    default=SHAPES[0],
                    tooltip=(
                        "disk: round, exact distance. diamond: as Grow Mask with tapered corners. "
                        "square: as Grow Mask without."
                    ),
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=MAX_FEATHER,
                    step=0.5,
                    tooltip="Soft edge in px: length of the ramp, or sigma of gaussian. 0: off.",
                ),
                io.Combo.Input(
                    "feather_mode",
                    options=list(FEATHERS),
                    default=FEATHERS[0],
                    tooltip=(
                        "ramp_out: the mask stays full and fades outside. ramp_in: fades inside. "
                        "ramp_center: half on either side. gaussian: blur, the only one for grey "
                        "masks (threshold 0)."
                    ),
                ),
                io.Combo.Input(
                    "temporal",
                    options=list(TEMPORAL),
                    default=TEMPORAL[0],
                    tooltip=(
                        "Against flicker, before all other steps. ema: each frame keeps a share of "
                        "the one before. ema_both: ema forwards and backwards, no lag. median3, "
                        "median5: median over 3 or 5 frames. union: every frame gets the union of "
                        "all frames."
                    ),
                ),
                io.Float.Input(
                    "temporal_strength",
                    default=0.5,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="For ema and ema_both: share of the previous frame that stays.",
                ),
            ],
            outputs=[
                io.Mask.Output("refined", display_name="mask", tooltip="The refined mask."),
                io.Mask.Output(
                    "inverted", display_name="inverted", tooltip="1 minus the refined mask."
                ),
                io.Int.Output(
                    "x", tooltip="Left edge in pixels of the box around the mask in all frames."
                ),
                io.Int.Output("y", tooltip="Top edge in pixels of that box."),
                io.Int.Output(
                    "width", tooltip="Width in pixels of that box; 0 if the mask is empty."
                ),
                io.Int.Output(
                    "height", tooltip="Height in pixels of that box; 0 if the mask is empty."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **known(
                io.Schema,
                search_aliases=[
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
            ),
        )

    @classmethod
    def execute(cls, mask, **settings) -> io.NodeOutput:
        chosen = RefineSettings(**settings)
        show_text(cls.hidden.unique_id, glue.PREPARING)
        refined, inverted, box, text = glue.refine_mask(mask, chosen)
        show_text(cls.hidden.unique_id, text)
        preview = ui.PreviewMask(glue.preview_frames(refined)) if len(refined) else None
        return io.NodeOutput(refined, inverted, *box, ui=preview)


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
