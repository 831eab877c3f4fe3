"""The node that dresses many people at once."""

from __future__ import annotations

import functools

from comfy_api.v0_0_2 import io

from ...kernels.tryon import batching
from .._comfy import found_by, show_text
from . import batch_run, common_inputs, delivery


class FrugalTryOnBatch(io.ComfyNode):
    """Persons and garments to finished photos, under a memory budget."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnBatch",
            display_name="Try-On Batch",
            category=common_inputs.FAMILY,
            description=(
                "Virtual try-on of many garments on many persons: each image is encoded once, and "
                "sampled in batches that fit into memory. If memory runs out, the batch is halved "
                "and the work continues."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip=("The MODEL of 'Load CatVTON' (mask-based version).")
                ),
                io.Vae.Input("vae", tooltip=common_inputs.VAE),
                io.Image.Input(
                    "persons", tooltip="Photos: a batch, or a list of images of any size."
                ),
                io.Image.Input(
                    "garments", tooltip="Garments: a batch, or a list of images of any size."
                ),
                io.Mask.Input(
                    "masks", tooltip="Area to repaint: one mask per person, or one for all."
                ),
                io.Combo.Input(
                    "combine",
                    options=[batching.ALL, batching.PAIRS],
                    default=batching.ALL,
                    tooltip=(
                        "all combinations: every garment on the first person, then on the second. "
                        "pairs: first with first; a single image is used for all."
                    ),
                ),
                *common_inputs.canvas_size(
                    "Canvas width in px, a multiple of 8; a list gives one per person.",
                    "Canvas height in px, a multiple of 8; a list gives one per person.",
                ),
                common_inputs.fit(common_inputs.FIT_WITH_CONTEXT),
                common_inputs.steps("Number of steps; not used if sigmas are connected."),
                common_inputs.cfg(),
                common_inputs.eta(
                    "DDIM eta, the fresh noise per step: 1 as published, 0 = none. Not used if a "
                    "sampler is connected."
                ),
                common_inputs.seed("Seed of the first image; each following image adds 1."),
                common_inputs.mask_blur(common_inputs.SHORT_BLUR),
                common_inputs.memory_budget(),
                common_inputs.largest_group(),
                common_inputs.color_match(common_inputs.SHORT_MATCH),
                *common_inputs.other_sampler(),
                common_inputs.blend(),
                common_inputs.garment_mask("garment_masks", "masks"),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="The finished photos in order, each at its person's own size.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Batches, sizes and times, as text."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            **found_by(
                ["catvton", "virtual try-on", "vton", "batch", "clothes", "queue"],
                "FrugalTryOnBatch",
            ),
        )

    @classmethod
    def execute(cls, model, vae, persons, garments, masks, combine, width, height,
                garment_masks=None, **rest):  # fmt: skip
        # Every input comes as a list, a widget's with one entry.
        one = {name: values[0] for name, values in rest.items() if values}
        persons = batch_run.listed("person", persons, masks, "masks")
        garments = batch_run.listed("garment", garments, garment_masks or [], "garment_masks")
        scenes = batch_run.scenes_of(len(persons), len(garments), combine[0], width, height)
        how = batch_run.settings_of(model[0], one)
        held = delivery.InMemory()
        say = functools.partial(show_text, cls.hidden.unique_id)
        run = batch_run.Batch(model[0], vae[0], persons, garments, scenes, how, held, say)
        text = run.run().text()
        say(text)
        return io.NodeOutput([held.pictures[number] for number in sorted(held.pictures)], text)


NODES = [FrugalTryOnBatch]
