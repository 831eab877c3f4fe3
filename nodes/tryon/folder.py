"""Nodes that take pictures from folders, and write results into one."""

from __future__ import annotations

import functools
import math

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.tryon import batching
from .._comfy import found_by, show_text
from . import batch_run, common_inputs, delivery, folder_run, picture_files

# Change how fast the node works, and not what it makes.
PACE = ("memory_budget", "largest_group", "filename_prefix")


def _folder(name: str, tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=picture_files.folders(), tooltip=tooltip)


def _subfolders() -> io.Input:
    return io.Boolean.Input(
        "subfolders", default=False, tooltip="Include the folders inside; their names come first."
    )


class FrugalLoadPictures(io.ComfyNode):
    """A folder as a list."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalLoadPictures",
            display_name="Load Pictures from Folder",
            category=common_inputs.FAMILY,
            description=(
                "Loads all pictures of a folder in ComfyUI's input folder as a list, each at its "
                "own size, sorted by name and upright. All are in memory at once."
            ),
            inputs=[
                _folder("folder", "Folder below ComfyUI's input folder."),
                io.Boolean.Input(
                    "white",
                    default=True,
                    tooltip=(
                        "Put what is transparent on white. Off: keep the colours below, as for "
                        "photos whose clothes were erased in the MaskEditor."
                    ),
                ),
                _subfolders(),
            ],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", is_output_list=True, tooltip="The pictures."
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    is_output_list=True,
                    tooltip="Of each picture, 1 where it is transparent; all 0 without alpha.",
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    is_output_list=True,
                    tooltip="File names without their endings.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was loaded, and what could not."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by(["load images", "folder", "directory", "batch", "dataset", "exif"]),
        )

    @classmethod
    def validate_inputs(cls, folder=None):
        return _there(folder)

    @classmethod
    def fingerprint_inputs(cls, folder, white, subfolders):
        files = picture_files.named_pictures(folder, subfolders)
        return [[name, *_stamp(path)] for name, path in files.items()]

    @classmethod
    def execute(cls, folder, white, subfolders):
        images, masks, names, failed = [], [], [], []
        found = picture_files.named_pictures(folder, subfolders)
        bar = comfy.utils.ProgressBar(len(found))
        for name, path in found.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                colour, alpha = picture_files.read_picture(path)
            except FrugalError as error:
                failed.append(str(error))
                LOG.warning("[Frugal] Load Pictures from Folder leaves out: %s", error)
                continue
            images.append(picture_files.on_white(colour, alpha) if white else colour)
            masks.append(torch.zeros(colour.shape[:3]) if alpha is None else 1 - alpha)
            names.append(name)
            bar.update(1)
        if not images:
            raise FrugalError(
                f"none of the {len(failed)} pictures in input/{folder} can be read: {failed[0]}",
                "at least one",
                "look at that file",
            )
        held = sum(image.nbytes for image in images) / 2**20
        lines = [f"{len(images)} pictures, {held:.0f} MB in memory"]
        report = "\n".join(lines + [f"left out: {line}" for line in failed])
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(images, masks, names, report)


def _stamp(path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _there(folder: str | None) -> bool | str:
    """For `validate_inputs`: True, or a sentence on a folder that is not there."""
    try:
        if folder is not None:
            picture_files.input_folder(folder)
    except FrugalError as error:
        return str(error)
    return True


class FrugalTryOnFolder(io.ComfyNode):
    """A shop's day: folders in, a folder out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalTryOnFolder",
            display_name="Try-On Folder",
            category=common_inputs.FAMILY,
            description=(
                "Virtual try-on of a folder of garments on a folder of persons. Each photo is read "
                "when its turn comes and each result is written when it is finished, so memory "
                "does not grow. Queued again after a stop, it goes on where it was."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL of 'Load CatVTON' (mask-based version)."
                ),
                io.Vae.Input("vae", tooltip=common_inputs.VAE),
                _folder("persons", "Folder of photos below ComfyUI's input folder."),
                _folder("garments", "Folder of garments; what is transparent becomes white."),
                io.Combo.Input(
                    "masks",
                    options=[folder_run.ERASED, *picture_files.folders()],
                    tooltip=(
                        "Folder of masks with the names of the photos, white where to repaint; or "
                        "what is erased in the photos themselves."
                    ),
                ),
                io.Combo.Input(
                    "combine",
                    options=[batching.ALL, batching.PAIRS],
                    default=batching.ALL,
                    tooltip="all combinations: every garment on every person. pairs: first with "
                    "first; a single picture is used for all.",
                ),
                io.Combo.Input(
                    "pairs_file",
                    options=folder_run.lists(),
                    default=folder_run.NO_LIST,
                    tooltip="CSV file in the input folder with a person and a garment per line; "
                    "used instead of combine.",
                ),
                _subfolders(),
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
                common_inputs.seed("Seed of the first image; each following image adds 1."),
                common_inputs.mask_blur(common_inputs.SHORT_BLUR),
                common_inputs.memory_budget(),
                common_inputs.largest_group(),
                io.String.Input(
                    "filename_prefix",
                    default="tryon/shop",
                    tooltip="Folder below ComfyUI's output folder; a number is added. The same "
                    "settings go on in the same folder.",
                ),
                common_inputs.color_match(common_inputs.SHORT_MATCH),
                common_inputs.blend(),
                *common_inputs.other_sampler(),
            ],
            outputs=[
                io.String.Output(
                    "folder", display_name="folder", tooltip="Where the pictures are."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was made, what was not and why."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            **found_by(
                ["catvton", "virtual try-on", "batch", "shop", "directory", "csv", "resume"]
            ),
        )

    @classmethod
    def validate_inputs(cls, persons=None, garments=None, masks=None):
        chosen = [persons, garments, None if masks == folder_run.ERASED else masks]
        return next((said for said in map(_there, chosen) if said is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **_):
        return math.nan  # folders change; what is there already is not made again

    @classmethod
    def execute(cls, model, vae, persons, garments, masks, combine, pairs_file, subfolders, width,
                height, filename_prefix, **rest):  # fmt: skip
        size = (height, width)
        shop = folder_run.open_shop(persons, garments, masks, combine, pairs_file, size, subfolders)
        how = batch_run.settings_of(model, rest)
        hidden = cls.hidden
        settings = folder_run.ancestors(hidden.prompt, str(hidden.unique_id), PACE)
        target = delivery.InFolder(
            filename_prefix,
            shop.names,
            settings or [size, how.cfg, how.seed, how.fit, how.blur, how.sigmas.tolist()],
            delivery.graph_info(hidden.prompt, hidden.extra_pnginfo),
            shop.dates,
        )
        say = functools.partial(show_text, hidden.unique_id)
        run = batch_run.Batch(
            model, vae, shop.persons, shop.garments, shop.scenes, how, target, say
        )
        report = "\n".join([target.shown, run.run().text(), *shop.strays])
        target.close(report, shop.rows)
        say(report)
        return io.NodeOutput(target.shown, report, ui=target.sheets())


NODES = [FrugalLoadPictures, FrugalTryOnFolder]
