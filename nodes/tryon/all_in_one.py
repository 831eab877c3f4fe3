"""The whole try-on as one node, made of the family's other nodes."""

from __future__ import annotations

from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import GraphBuilder

from ...kernels.tryon.blending import INSIDE
from .._comfy import found_by, known
from . import common_inputs

# Wires are passed on to the inner nodes as wires and not as what they carry, so that ComfyUI keeps
# each inner node's result: another seed does not encode again, another blur does not sample again.
WIRE = {"rawLink": True}


class FrugalTryOn(io.ComfyNode):
    """Person, garment and mask to a finished photo."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOn",
            display_name="Try-On",
            category=common_inputs.FAMILY,
            description=(
                "Virtual try-on in one node: prepare, condition, sample as published for CatVTON, "
                "and stitch. It expands into those nodes and gives the same result."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL of 'Load CatVTON' (mask-based version).",
                    extra_dict=WIRE,
                ),
                io.Vae.Input(
                    "vae",
                    tooltip=common_inputs.VAE,
                    extra_dict=WIRE,
                ),
                io.Image.Input(
                    "person",
                    tooltip="Photo of the person, any size; alpha is composited on white.",
                    extra_dict=WIRE,
                ),
                io.Image.Input(
                    "garment",
                    tooltip="Image of the garment, any size; alpha is composited on white.",
                    extra_dict=WIRE,
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Area to repaint: 1 on the old garment and around it.",
                    extra_dict=WIRE,
                ),
                *common_inputs.canvas_size(
                    "Canvas width in px, a multiple of 8; CatVTON was trained at 768 and 384.",
                    "Canvas height in px, a multiple of 8; CatVTON was trained at 1024 and 512.",
                ),
                common_inputs.fit(common_inputs.FIT_WITH_CONTEXT),
                common_inputs.steps("Number of steps; CatVTON uses 50."),
                common_inputs.cfg(),
                common_inputs.eta(
                    "DDIM eta, the fresh noise per step: 1 as published, 0 = none (plain DDIM)."
                ),
                common_inputs.seed("Seed of the noise."),
                common_inputs.mask_blur(common_inputs.SHORT_BLUR),
                common_inputs.color_match(common_inputs.SHORT_MATCH),
                common_inputs.blend(),
                common_inputs.garment_mask(extra_dict=WIRE),
            ],
            outputs=common_inputs.pictures(as_lists=True),
            enable_expand=True,
            **found_by([*common_inputs.WORDS, "clothes swap", "outfit"], "FrugalTryOn"),
        )

    @classmethod
    def execute(cls, model, vae, person, garment, mask, width, height, fit, steps, cfg, eta, seed,
                mask_blur, color_match=False, blend=INSIDE, garment_mask=None):  # fmt: skip
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
            **({} if garment_mask is None else {"garment_mask": garment_mask}),
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
            blend=blend,
        )
        every = graph.node(
            "FrugalTryOnGather", "gather", images=stitch.out(0), canvases=stitch.out(1)
        )
        return io.NodeOutput(every.out(0), every.out(1), expand=graph.finalize())


class FrugalTryOnGather(io.ComfyNode):
    """The last node of the expansion: all pictures of a run as one value per output.

    For a list of photos ComfyUI runs each inner node once per photo. Of an expanded node's outputs
    it then takes the first values, of whichever output they are; a list that is one value it keeps.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnGather",
            display_name="Gather Try-On Results",
            category=common_inputs.FAMILY,
            description="Inner node of 'Try-On': gathers the photos of a list.",
            inputs=[
                io.Image.Input("images", tooltip="Finished photos."),
                io.Image.Input("canvases", tooltip="What the model painted."),
            ],
            outputs=common_inputs.pictures(),
            is_input_list=True,
            **found_by(common_inputs.WORDS),
            **known(io.Schema, is_dev_only=True),
        )

    @classmethod
    def execute(cls, images, canvases):
        return io.NodeOutput(images, canvases)


NODES = [FrugalTryOn, FrugalTryOnGather]
