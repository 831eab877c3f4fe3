"""Nodes of one step each: grow, feather, clean, hull, smoothing over time."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.masks.refine import HULLS, hull, refine
from ...kernels.masks.settings import TEMPORAL, RefineSettings
from .._comfy import found_by, show_text
from .._preview import preview
from . import common_inputs, glue


def edited(node, mask, work, with_inverse: bool = False) -> io.NodeOutput:
    """Run work(array, progress) on the mask, show time and preview, and hand the result on."""
    show_text(node.hidden.unique_id, glue.PREPARING)
    made, line = glue.edit_mask(mask, work)
    show_text(node.hidden.unique_id, line)
    results = (made, glue.inverted(made)) if with_inverse else (made,)
    return io.NodeOutput(*results, ui=preview(made))


class FrugalMaskGrow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskGrow",
            display_name="Grow Mask (px)",
            category=common_inputs.FAMILY,
            description="Grows or shrinks a mask by an exact number of pixels; round, diamond or "
            "square. Soft masks stay soft.",
            inputs=[
                io.Mask.Input("mask", tooltip=common_inputs.MASK),
                *common_inputs.growth(
                    8,
                    "disk: exact Euclidean distance. diamond: as ComfyUI's Grow Mask with tapered "
                    "corners. square: as Grow Mask without.",
                ),
            ],
            outputs=[
                io.Mask.Output("grown", display_name="mask", tooltip="The grown mask."),
                io.Mask.Output(
                    "inverted", display_name="inverted", tooltip="1 minus the grown mask."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["expand mask", "shrink mask", "dilate", "erode", "mask offset"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, grow, grow_shape) -> io.NodeOutput:
        chosen = RefineSettings(threshold=0, grow=grow, grow_shape=grow_shape)
        return edited(cls, mask, lambda array, step: refine(array, chosen, step), True)


class FrugalMaskFeather(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskFeather",
            display_name="Feather Mask Edge",
            category=common_inputs.FAMILY,
            description="Softens the edge of a mask: a ramp of exact length in px, or a blur.",
            inputs=[
                io.Mask.Input("mask", tooltip=common_inputs.MASK),
                *common_inputs.soft_edge(
                    12.0,
                    "Length of the ramp in pixels, or sigma of gaussian in pixels.",
                    "ramp_out: full inside, fades outside. ramp_in: fades inside. ramp_center: "
                    "half on either side. gaussian: blur.",
                ),
                common_inputs.threshold(
                    "Value at which the edge lies. 0 keeps grey values, for gaussian only."
                ),
            ],
            outputs=[io.Mask.Output("feathered", display_name="mask", tooltip="The soft mask.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["blur mask", "soft edge", "mask blur"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, feather, feather_mode, threshold) -> io.NodeOutput:
        chosen = RefineSettings(threshold=threshold, feather=feather, feather_mode=feather_mode)
        return edited(cls, mask, lambda array, step: refine(array, chosen, step))


class FrugalMaskClean(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskClean",
            display_name="Clean Mask",
            category=common_inputs.FAMILY,
            description="Fills holes and removes specks, by area in px. Soft masks keep their "
            "soft edge.",
            inputs=[
                io.Mask.Input("mask", tooltip=common_inputs.MASK),
                *common_inputs.regions(fill_holes=-1, drop_islands=64),
            ],
            outputs=[
                io.Mask.Output("cleaned", display_name="mask", tooltip="The clean mask."),
                io.Int.Output(
                    "regions",
                    display_name="regions",
                    tooltip="Number of remaining regions, over all frames.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["fill holes", "remove islands", "despeckle mask", "largest region"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, **changes) -> io.NodeOutput:
        show_text(cls.hidden.unique_id, glue.PREPARING)
        made, count, text = glue.clean_mask(mask, RefineSettings(threshold=0, **changes))
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(made, count, ui=preview(made))


class FrugalMaskHull(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskHull",
            display_name="Mask Hull",
            category=common_inputs.FAMILY,
            description=(
                "Fills concave parts: the convex hull of each region or of all, or a closing that "
                "fills narrow gaps only."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip=common_inputs.MASK),
                io.Combo.Input(
                    "mode",
                    options=list(HULLS),
                    default=HULLS[0],
                    tooltip=(
                        "per_region: a hull around each region. whole: one hull around everything "
                        "in the frame. closing: only gaps narrower than twice the radius, so the "
                        "space between arm and body can stay open."
                    ),
                ),
                common_inputs.closing_radius(),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="A pixel is inside where its value is above this.",
                ),
            ],
            outputs=[io.Mask.Output("hull", display_name="mask", tooltip="The hull, 0 or 1.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["convex hull", "close mask", "closing"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, mode, radius, threshold) -> io.NodeOutput:
        return edited(
            cls, mask, lambda array, step: hull(array, mode, radius, threshold, progress=step)
        )


class FrugalMaskTemporal(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskTemporal",
            display_name="Smooth Mask over Time",
            category=common_inputs.FAMILY,
            description="Reduces flicker in a clip of masks, pixel by pixel over time.",
            inputs=[
                io.Mask.Input("mask", tooltip="A clip of masks; it is not changed."),
                io.Combo.Input(
                    "mode",
                    options=[mode for mode in TEMPORAL if mode != "off"],
                    default="median3",
                    tooltip=(
                        "median3, median5: median over 3 or 5 frames; removes single bad frames "
                        "and keeps edges hard. ema: exponential moving average; edges lag. "
                        "ema_both: ema forwards and backwards, without lag. union: every frame "
                        "gets the union of all frames."
                    ),
                ),
                common_inputs.share(
                    "strength",
                    ("For ema and ema_both: weight of the neighbouring frame, 0 to 0.99."),
                ),
            ],
            outputs=[io.Mask.Output("smoothed", display_name="mask", tooltip="The smoothed clip.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(
                ["mask flicker", "stabilize mask", "temporal", "deflicker"], "FrugalMaskTemporal"
            ),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, mask, mode, strength) -> io.NodeOutput:
        chosen = RefineSettings(threshold=0, temporal=mode, temporal_strength=strength)
        return edited(cls, mask, lambda array, step: refine(array, chosen, step))
