"""The whole try-on as one node, made of the family's other nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import GraphBuilder

from ...kernels.tryon import canvas
from .._comfy import CATEGORY, known

FAMILY = f"{CATEGORY}/Try-on"
# Wires are passed on to the inner nodes as wires and not as what they carry, so that ComfyUI keeps
# each inner node's result: another seed encodes nothing anew, another blur samples nothing anew.
WIRE = {"rawLink": True}


class FrugalTryOn(io.ComfyNode):
    """Person, garment and mask to a finished photo."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOn",
            display_name="Try-On",
            category=FAMILY,
            description="Dresses a person: prepare, condition, sample as CatVTON was published, "
            "and stitch, in one node. It expands into those nodes and gives what they give.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL of 'Load CatVTON' (with mask).", extra_dict=WIRE
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="SD 1.5 VAE; CatVTON was trained with sd-vae-ft-mse.",
                    extra_dict=WIRE,
                ),
                io.Image.Input(
                    "person",
                    tooltip="Photo of the person, any size; alpha is dropped.",
                    extra_dict=WIRE,
                ),
                io.Image.Input(
                    "garment",
                    tooltip="Picture of the garment, any size; alpha is laid on white.",
                    extra_dict=WIRE,
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where to repaint: 1 on the old garment and around it.",
                    extra_dict=WIRE,
                ),
                io.Int.Input(
                    "width",
                    default=768,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Canvas width in px, a multiple of 8; CatVTON knows 768 and 384.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Canvas height in px, a multiple of 8; CatVTON knows 1024 and 512.",
                ),
                io.Combo.Input(
                    "fit",
                    options=[canvas.CROP, canvas.LETTERBOX],
                    default=canvas.CROP,
                    tooltip="crop around mask: a window around the mask, with 25 % context. "
                    "letterbox: the whole photo with bars.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=500,
                    tooltip="Number of steps; CatVTON takes 50.",
                ),
                io.Float.Input(
                    "cfg",
                    default=2.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the garment; 2.5 as published, 1 is off and twice as "
                    "fast.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Fresh noise per step: 1 as published, 0 for none (plain DDIM).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input(
                    "mask_blur",
                    default=9,
                    min=0,
                    max=256,
                    tooltip="Softness of the mask's edge: standard deviation in photo px.",
                ),
                io.Boolean.Input(
                    "color_match",
                    default=False,
                    optional=True,
                    tooltip="Match the painted colours to the photo around the mask.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", tooltip="The photo with the garment on."
                ),
                io.Image.Output(
                    "canvas",
                    display_name="canvas",
                    tooltip="What the model painted, at canvas size, not composited.",
                ),
            ],
            enable_expand=True,
            **known(
                io.Schema,
                search_aliases=["catvton", "virtual try-on", "vton", "clothes", "garment"],
            ),
        )

    @classmethod
    def execute(cls, model, vae, person, garment, mask, width, height, fit, steps, cfg, eta, seed,
                mask_blur, color_match=False):  # fmt: skip
        graph = GraphBuilder()
        prepare = graph.node(
            "FrugalTryOnPrepare",
            "prepare",
            person=person,
            garment=garment,
            mask=mask,
            width=width,
            height=height,
            fit=fit,
            context=25,
            mask_threshold=0.5,
        )
        condition = graph.node(
            "FrugalTryOnConditioning",
            "condition",
            person_canvas=prepare.out(0),
            garment_canvas=prepare.out(1),
            mask_canvas=prepare.out(2),
            vae=vae,
        )
        levels = graph.node("FrugalTryOnSigmas", "sigmas", model=model, steps=steps, eta=eta)
        sample = graph.node(
            "SamplerCustom",
            "sample",
            model=model,
            add_noise=True,
            noise_seed=seed,
            cfg=cfg,
            positive=condition.out(0),
            negative=condition.out(1),
            sampler=levels.out(1),
            sigmas=levels.out(0),
            latent_image=condition.out(2),
        )
        stitch = graph.node(
            "FrugalTryOnStitch",
            "stitch",
            samples=sample.out(0),
            vae=vae,
            frame=prepare.out(3),
            mask_blur=mask_blur,
            color_match=color_match,
        )
        return io.NodeOutput(stitch.out(0), stitch.out(1), expand=graph.finalize())


NODES = [FrugalTryOn]
