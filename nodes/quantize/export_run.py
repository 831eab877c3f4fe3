"""What the export for a server needs of ComfyUI: the folders of diffusers models."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.model_management
import folder_paths

from ...kernels.errors import FrugalError
from ...kernels.quantize.vllm_folder import ServerJob, ServerReport, export
from ...kernels.quantize.vllm_folder_parts import MODEL
from . import convert_run

KIND = "diffusers"


def folders() -> list[str]:
    """Diffusers folders to choose from, and before them that none is wanted."""
    found = {
        os.path.relpath(place, root)
        for root in folder_paths.get_folder_paths(KIND)
        for place, _, names in os.walk(root, followlinks=True)
        if MODEL in names and not place.endswith(convert_run.PART)
    }
    return [convert_run.NONE, *sorted(found)]


def folder_path(name: str) -> Path | None:
    """The full path of a folder chosen from `folders`. Raises FrugalError if it is gone."""
    if name == convert_run.NONE:
        return None
    for root in folder_paths.get_folder_paths(KIND):
        path = Path(root) / name
        if (path / MODEL).is_file():
            return path
    raise FrugalError(
        f"{name} is not there", f"a folder in models/{KIND}", "refresh the list and choose again"
    )


def output_folder(name: str) -> Path:
    """Where a folder called `name` is written. Raises FrugalError for a name that is empty or leads
    out of the models folder.
    """
    root = Path(folder_paths.get_folder_paths(KIND)[0]).resolve()
    path = (root / name.strip()).resolve()
    if not name.strip() or root not in path.parents:
        raise FrugalError(
            f"the name {ascii(name)[:60]}", f"a folder inside models/{KIND}", "type a plain name"
        )
    return path


def write(job: ServerJob, loras: list[tuple[Path, float]], say) -> ServerReport:
    """Do a job with ComfyUI's progress bar and cancelling; `say` gets a line about the stage."""
    if job.device.type != "cpu":
        comfy.model_management.free_memory(convert_run.MEMORY, job.device)
    progress = convert_run.shown_progress({"write": "writing"}, say)
    return export(
        job,
        lambda weights: convert_run.merge_of(weights, loras),
        lambda done, total: progress("write", done, total),
    )
