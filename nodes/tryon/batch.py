"""The node that dresses many people at once."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...kernels.tryon import batching
from .._comfy import known, show_text
from . import batch_run, common_inputs


class FrugalTryOnBatch(io.ComfyNode):
    """Persons and garments to finished photos, under a memory budget."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnBatch",
            display_name="Try-On Batch",
            category=common_inputs.FAMILY,
            description="Dresses many persons in many garments: each picture is encoded once, "
            "sampled in groups that fit into memory. When memory runs out the group is halved and "
            "the work goes on.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of 'Load CatVTON' (with mask)."),
                io.Vae.Input("vae", tooltip=common_inputs.VAE),
                io.Image.Input(
                    "persons", tooltip="Photos: a batch, or a list of pictures of any sizes."
                ),
                io.Image.Input(
                    "garments", tooltip="Garments: a batch, or a list of pictures of any sizes."
                ),
                io.Mask.Input(
                    "masks", tooltip="Where to repaint: one mask per person, or one for all."
                ),
                io.Combo.Input(
                    "combine",
                    options=[batching.ALL, batching.PAIRS],
                    default=batching.ALL,
                    tooltip="all combinations: every garment on the first person, then on the "
                    "second. pairs: first with first; a single one serves all.",
                ),
                *common_inputs.canvas_size(
                    "Canvas width in px, a multiple of 8; a list gives one per person.",
                    "Canvas height in px, a multiple of 8; a list gives one per person.",
                ),
                common_inputs.fit(common_inputs.FIT_WITH_CONTEXT),
                common_inputs.steps("Number of steps; unused with sigmas of your own."),
                common_inputs.cfg(),
                common_inputs.eta(
                    "Fresh noise per step: 1 as published, 0 for none. Unused with a sampler of "
                    "your own."
                ),
                common_inputs.seed("Seed of the first picture; each next one takes one more."),
                common_inputs.mask_blur(common_inputs.SHORT_BLUR),
                io.Float.Input(
                    "memory_budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="GiB for the work of the UNet, beside its weights. 0: what ComfyUI "
                    "reports free.",
                ),
                io.Int.Input(
                    "largest_group",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Most pictures per forward, whatever the memory.",
                ),
                common_inputs.color_match(common_inputs.SHORT_MATCH),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Another sampler than CatVTON's; needs sigmas.",
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels for the sampler."),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="The finished photos in order, each at its person's own size.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Groups, sizes and times, as text."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            **known(
                io.Schema,
                search_aliases=["catvton", "virtual try-on", "vton", "batch", "clothes", "queue"],
            ),
        )

    @classmethod
    def execute(cls, model, vae, persons, garments, masks, combine, width, height, **rest):
        # Every input comes as a list, a widget's with one entry.
        one = {name: values[0] for name, values in rest.items() if values}
        persons = batch_run.single_pictures(persons)
        garments = batch_run.single_pictures(garments)
        scenes = batch_run.scenes_of(len(persons), len(garments), combine[0], width, height)
        sampler, sigmas = batch_run.schedule(
            model[0], one["steps"], one["eta"], one.get("sampler"), one.get("sigmas")
        )
        how = batch_run.Settings(
            cfg=one["cfg"],
            seed=one["seed"],
            sampler=sampler,
            sigmas=sigmas,
            fit=one["fit"],
            context=25,
            threshold=0.5,
            blur=one["mask_blur"],
            color_match=one.get("color_match", False),
            budget=int(one["memory_budget"] * 2**30),
            largest=one["largest_group"],
        )
        masks = batch_run.single_pictures(masks)
        run = batch_run.Batch(model[0], vae[0], persons, masks, garments, scenes, how)
        images, report = run.run()
        show_text(cls.hidden.unique_id, report.text())
        return io.NodeOutput(images, report.text())


NODES = [FrugalTryOnBatch]
