"""Try-on nodes: load, prepare, condition, stitch. Schemas only; the work is in loading, glue and
kernels.
"""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ...kernels.log import LOG
from ...kernels.tryon import blending, canvas, checks, pictures, precision
from .._comfy import REPORT_KEY, found_by, show_text
from .._models import offered
from . import (
    all_in_one,
    batch,
    common_inputs,
    folder,
    glue,
    load_run,
    mask_free,
    parse,
    saving,
    sigmas,
)
from .common_inputs import FAMILY, WORDS

Frame = io.Custom("FRUGAL_TRYON_FRAME")

glue.register_folder()


class FrugalLoadCatVTON(io.ComfyNode):
    """CatVTON's UNet as a MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadCatVTON",
            display_name="Load CatVTON",
            category=FAMILY,
            description="Loads an SD 1.5 inpainting UNet with CatVTON's try-on attention as a "
            "MODEL for any sampler. Cross-attention is skipped, so no text encoder is needed.",
            inputs=[
                io.Combo.Input(
                    "base",
                    options=glue.base_choices(),
                    tooltip="SD 1.5 inpainting model (9 input channels): a file, or a diffusers "
                    "folder in models/CatVTON.",
                ),
                io.Combo.Input(
                    "attention",
                    options=glue.attention_choices(),
                    default=glue.NO_ATTENTION,
                    tooltip=(
                        "CatVTON attention file in models/CatVTON: model.safetensors of a "
                        "version's attention folder. none: the base already contains it."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["auto", *load_run.DTYPES],
                    default="auto",
                    tooltip=(
                        "Data type of the weights in memory; the full model takes 3.3 GB in fp32, "
                        "1.6 GB in fp16 and bf16. auto: what ComfyUI chooses for this device. For "
                        "a quantised model it applies to the weights that stay in floating point."
                    ),
                ),
                io.Combo.Input(
                    "quantize",
                    options=list(precision.CHOICES),
                    default=precision.AS_STORED,
                    optional=True,
                    tooltip=(
                        "Keep matrices and 3 x 3 convolutions in 8 bits: 0.9 GB instead of 1.6 GB; "
                        "int8 is more accurate than fp8. The file is not changed; 'Save CatVTON' "
                        "saves the result."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The try-on UNet."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was loaded, as text."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by([*WORDS, "load", "checkpoint"], "FrugalLoadCatVTON"),
        )

    @classmethod
    def validate_inputs(cls, base=None, attention=None):
        found = glue.base_offered(base)
        if found is not True:
            return found
        folder = f"models/{glue.KIND}"
        return offered(attention, glue.attention_choices(), folder, glue.ATTENTION_PAGE)

    @classmethod
    def execute(cls, base, attention, weight_dtype, quantize=precision.AS_STORED):
        patcher = load_run.load_catvton(
            glue.base_path(base), glue.attention_path(attention), weight_dtype, quantize
        )
        text = patcher.attachments[REPORT_KEY].text()
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(patcher, text, ui=ui.PreviewText(text))


class FrugalTryOnPrepare(io.ComfyNode):
    """Person, garment and mask on canvases of one size."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnPrepare",
            display_name="Prepare Try-On",
            category=FAMILY,
            description=(
                "Crops or fits person, garment and mask to the working size of the try-on model, "
                "and records how to put the result back into the photo."
            ),
            inputs=[
                io.Image.Input(
                    "person", tooltip="Photo of the person, any size; alpha is composited on white."
                ),
                io.Image.Input(
                    "garment",
                    tooltip=("Image of the garment, any size; alpha is composited on white."),
                ),
                io.Mask.Input(
                    "mask", tooltip="Area to repaint: 1 on the old garment and around it."
                ),
                *common_inputs.canvas_size(
                    "Canvas width in px, a multiple of 8 (64 is best); CatVTON was trained at 768 "
                    "and 384.",
                    "Canvas height in px, a multiple of 8 (64 is best); CatVTON was trained at "
                    "1024 and 512.",
                ),
                common_inputs.fit(
                    "crop around mask: a window of the canvas's shape around the mask. letterbox: "
                    "the whole photo with bars."
                ),
                io.Int.Input(
                    "context",
                    default=25,
                    min=0,
                    max=400,
                    tooltip=(
                        "Margin around the mask's box when cropping, in percent per side; less "
                        "where the photo ends."
                    ),
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Mask values at or above this are repainted.",
                ),
                common_inputs.garment_mask(),
            ],
            outputs=[
                io.Image.Output(
                    "person_canvas",
                    display_name="person canvas",
                    tooltip="The person at canvas size; bars repeat the photo's border.",
                ),
                io.Image.Output(
                    "garment_canvas",
                    display_name="garment canvas",
                    tooltip="The whole garment at canvas size on white.",
                ),
                io.Mask.Output(
                    "mask_canvas",
                    display_name="mask canvas",
                    tooltip="The mask at canvas size, 0 or 1; bars are 0.",
                ),
                Frame.Output(
                    "frame",
                    display_name="frame",
                    tooltip="Photo, window and mask, for 'Stitch Try-On'.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by([*WORDS, "crop", "letterbox"]),
        )

    @classmethod
    def execute(cls, person, garment, mask, width, height, fit, context, mask_threshold,
                garment_mask=None):  # fmt: skip
        size = (height, width)
        made = canvas.prepare(
            person, garment, mask, size, fit, context, mask_threshold, garment_mask
        )
        notes = [
            *checks.mask_notes(mask, made.frame),
            *checks.garment_notes(pictures.on_white(garment, garment_mask, "garment")),
        ]
        if notes:
            show_text(cls.hidden.unique_id, "\n".join(f"note: {note}" for note in notes))
            LOG.warning("[Frugal] Prepare Try-On: %s.", "; ".join(notes))
        return io.NodeOutput(made.person, made.garment, made.mask, made.frame)


class FrugalTryOnConditioning(io.ComfyNode):
    """Canvases to conditioning and an empty stacked latent."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnConditioning",
            display_name="Try-On Conditioning",
            category=FAMILY,
            description=(
                "Encodes the masked person over the garment as inpainting conditioning. The "
                "negative has an empty garment half, so that cfg strengthens the garment."
            ),
            inputs=[
                *common_inputs.canvases(),
                io.Mask.Input("mask_canvas", tooltip="Mask from 'Prepare Try-On'."),
                io.Vae.Input("vae", tooltip=common_inputs.VAE),
            ],
            outputs=common_inputs.sides(
                "Empty latent, person over garment: twice the canvas's height."
            ),
            **found_by([*WORDS, "inpaint", "conditioning"]),
        )

    @classmethod
    def execute(cls, person_canvas, garment_canvas, mask_canvas, vae):
        return io.NodeOutput(*glue.conditioning(person_canvas, garment_canvas, mask_canvas, vae))


class FrugalTryOnStitch(io.ComfyNode):
    """Sampled latent back into the photo."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnStitch",
            display_name="Stitch Try-On",
            category=FAMILY,
            description=(
                "Decodes the person half and composites it into the photo at its original size. "
                "Pixels outside the mask stay as they were, bit for bit."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="Sampled latent of 'Try-On Conditioning'."),
                io.Vae.Input("vae", tooltip="The VAE used for the conditioning."),
                Frame.Input("frame", tooltip="Frame from 'Prepare Try-On'."),
                common_inputs.mask_blur(
                    "Softness of the mask's edge: standard deviation of a Gaussian in canvas px; "
                    "less where the mask is thin."
                ),
                common_inputs.color_match(
                    "Shift the painted colours so that mean and contrast match the photo in a ring "
                    "around the mask. Outside the mask nothing changes."
                ),
                common_inputs.blend(),
            ],
            outputs=common_inputs.pictures(),
            **found_by([*WORDS, "composite", "paste back"]),
        )

    @classmethod
    def execute(cls, samples, vae, frame, mask_blur, color_match=False, blend=blending.INSIDE):
        picture = glue.decode(samples, vae, frame.canvas)
        return io.NodeOutput(canvas.stitch(picture, frame, mask_blur, color_match, blend), picture)


class FrugalTryOnSigmas(io.ComfyNode):
    """CatVTON's schedule and sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnSigmas",
            display_name="Try-On Sigmas and Sampler",
            category=FAMILY,
            description="The noise levels and the sampler CatVTON was published with (DDIM, eta "
            "1), for SamplerCustom. KSampler with euler_ancestral and ddim_uniform comes close.",
            inputs=[
                io.Model.Input("model", tooltip="The try-on MODEL."),
                common_inputs.steps("Number of steps; CatVTON uses 50."),
                common_inputs.eta(
                    "DDIM eta, the fresh noise per step: 1 as published, 0 = none (plain DDIM)."
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="steps + 1 noise levels."
                ),
                io.Sampler.Output("sampler", display_name="sampler", tooltip="The sampler."),
            ],
            **found_by([*WORDS, "ddim", "scheduler"]),
        )

    @classmethod
    def execute(cls, model, steps, eta):
        return io.NodeOutput(*sigmas.reference_schedule(model, steps, eta))


NODES = [
    FrugalLoadCatVTON,
    FrugalTryOnPrepare,
    FrugalTryOnConditioning,
    FrugalTryOnStitch,
    FrugalTryOnSigmas,
    *saving.NODES,
    *mask_free.NODES,
    *batch.NODES,
    *folder.NODES,
    *all_in_one.NODES,
    *parse.NODES,
]
