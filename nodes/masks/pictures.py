"""Nodes that use a mask on pictures: composite, crop that follows the mask, and the way back."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.masks import pictures
from ...kernels.tryon.pictures import resize_picture
from .._comfy import found_by, show_text
from .._preview import preview
from . import common_inputs, glue

Window = io.Custom("FRUGAL_MASK_WINDOW")
PLACE = 16384


def pasted(node, under, work, note: str = "") -> io.NodeOutput:
    """Run work(progress) for an IMAGE result, show time and preview, and hand it on."""
    show_text(node.hidden.unique_id, glue.PREPARING)
    made, line = glue.measured(work)
    show_text(node.hidden.unique_id, line + note)
    image = glue.to_tensor(made, under)
    return io.NodeOutput(image, ui=preview(image))


class FrugalMaskComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskComposite",
            display_name="Composite through Mask",
            category=common_inputs.FAMILY,
            description=(
                "Composites one image or clip over another through a mask. Outside the mask the "
                "destination keeps its exact values."
            ),
            inputs=[
                io.Image.Input("destination", tooltip="Background image or clip."),
                io.Image.Input(
                    "source", tooltip=("Image or clip to place on top; a single image is repeated.")
                ),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "Mask of the source's size: 1 shows the source. A single mask is repeated."
                    ),
                ),
                io.Int.Input(
                    "x",
                    default=0,
                    min=-PLACE,
                    max=PLACE,
                    tooltip="Left edge of the source in the destination, in pixels.",
                ),
                io.Int.Input(
                    "y",
                    default=0,
                    min=-PLACE,
                    max=PLACE,
                    tooltip="Top edge of the source in the destination, in pixels.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The composite.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["blend", "paste", "overlay", "image composite"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, destination, source, mask, x, y) -> io.NodeOutput:
        under, over = glue.to_array(destination, "image"), glue.to_array(source, "image")
        weight = glue.to_array(mask)
        return pasted(
            cls,
            destination,
            lambda step: pictures.composite(under, over, weight, x, y, step),
        )


class FrugalMaskBBoxCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskBBoxCrop",
            display_name="Crop around Mask",
            category=common_inputs.FAMILY,
            description=(
                "Crops a window of constant size around the mask in every frame of a clip, to work "
                "at full resolution where it matters. Uncrop puts the result back."
            ),
            inputs=[
                io.Image.Input("image", tooltip="Image or clip."),
                io.Mask.Input("mask", tooltip="Mask that the window follows, of the image's size."),
                io.Float.Input(
                    "context",
                    default=1.2,
                    min=1.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Window size as a multiple of the largest mask box.",
                ),
                io.Int.Input(
                    "multiple_of",
                    default=16,
                    min=1,
                    max=pictures.MAX_MULTIPLE,
                    tooltip="Width and height are rounded up to a multiple of this many pixels. "
                    "16 fits Wan, 8 fits SD 1.5.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(pictures.FOLLOW),
                    default="follow",
                    tooltip=(
                        "follow: the window moves with the mask. union: one position for the whole "
                        "clip, larger. Frames with an empty mask keep the last box."
                    ),
                ),
                io.Float.Input(
                    "smoothing",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip=(
                        "For follow: smoothing of the window's path in frames (sigma); the mask "
                        "never leaves the window. 0 = off."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("cropped", display_name="image", tooltip="The cropped frames."),
                io.Mask.Output(
                    "cropped_mask", display_name="mask", tooltip="The mask, cropped the same way."
                ),
                Window.Output(
                    "window", display_name="window", tooltip="Position of the window, for Uncrop."
                ),
                io.Int.Output(
                    "width", display_name="width", tooltip="Width of the window in pixels."
                ),
                io.Int.Output(
                    "height", display_name="height", tooltip="Height of the window in pixels."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["crop and stitch", "bbox crop", "inpaint crop"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, image, mask, context, multiple_of, mode, smoothing) -> io.NodeOutput:
        show_text(cls.hidden.unique_id, glue.PREPARING)
        frames = pictures.pictures_of(glue.to_array(image, "image"), "image")
        masks = pictures.frames_of(glue.to_array(mask))
        where = pictures.window(masks, context, multiple_of, mode, smoothing)
        cut = glue.to_tensor(pictures.crop(frames, where, "edge"), image)
        cut_mask = glue.to_tensor(pictures.crop(masks, where, "zero"), mask)
        show_text(cls.hidden.unique_id, where.text())
        return io.NodeOutput(cut, cut_mask, where, *where.size, ui=preview(cut))


class FrugalMaskBBoxUncrop(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalMaskBBoxUncrop",
            display_name="Uncrop",
            category=common_inputs.FAMILY,
            description=(
                "Puts cropped frames back where Crop around Mask took them from. Outside the "
                "window, and where the mask is 0, the image keeps its exact values."
            ),
            inputs=[
                io.Image.Input("destination", tooltip="The image or clip that was cropped."),
                io.Image.Input(
                    "cropped",
                    tooltip="The edited window; resized to the window's size if it differs.",
                ),
                Window.Input("window", tooltip="From Crop around Mask."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Mask of the window's size: how much of the new image to use; feather it "
                        "for a soft seam. Not connected: the whole window is put back."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The whole image.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by(["stitch", "paste back", "bbox uncrop"]),
        )

    validate_inputs = classmethod(common_inputs.warmed)

    @classmethod
    def execute(cls, destination, cropped, window, mask=None) -> io.NodeOutput:
        under, note = glue.to_array(destination, "image"), ""
        width, height = window.size
        if tuple(cropped.shape[1:3]) != (height, width) and cropped.ndim == 4:
            note = f"\nresized {cropped.shape[2]} x {cropped.shape[1]} to {width} x {height} px"
            cropped = resize_picture(cropped, height, width)
        over = glue.to_array(cropped, "image")
        weight = None if mask is None else glue.to_array(mask)
        return pasted(
            cls,
            destination,
            lambda step: pictures.uncrop(under, over, window, weight, step),
            note,
        )
