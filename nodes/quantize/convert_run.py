"""What the converter needs of ComfyUI: folders, device, progress with cancelling, LoRAs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.quantize.convert import Merge
from ...kernels.quantize.curve_cache import SUFFIX as CURVES
from ...kernels.quantize.quality import SUFFIX as QUALITY
from ...kernels.quantize.request import Job, Outcome, Progress, run
from ...kernels.quantize.weights import Weights
from .._models import FOLDER
from ..lora.merge import LoraMerge
from ..wan.structure import structure

NONE = "none"
CALIBRATION = "calibration"
SUFFIX, PART = ".safetensors", ".part"
# What one layer takes on the device, in bytes, calibrated and with room to spare.
MEMORY = 6 * 10**9
TICKS = 1000

folder_paths.add_model_folder_path(
    CALIBRATION, os.path.join(folder_paths.models_dir, CALIBRATION), is_default=True
)


def files(kind: str) -> list[str]:
    """Files of a models folder to choose from, and before them that none is wanted."""
    found = folder_paths.get_filename_list(kind)
    return [NONE, *(name for name in found if name.endswith(SUFFIX) or kind != CALIBRATION)]


def quality_files() -> list[str]:
    """Quality files beside the models to choose from, and before them that none is wanted."""
    found = {
        os.path.relpath(os.path.join(place, name), folder)
        for folder in folder_paths.get_folder_paths(FOLDER)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(QUALITY)
    }
    return [NONE, *sorted(found)]


def quality_path(name: str) -> Path:
    """The full path of a file chosen from `quality_files`. Raises FrugalError if it is gone."""
    for folder in folder_paths.get_folder_paths(FOLDER):
        path = Path(folder) / name
        if path.is_file():
            return path
    raise FrugalError(f"{name} is not there", "a quality file", "refresh the list and choose again")


def output_path(prefix: str, ending: str) -> Path:
    """Where a model called `<prefix>_<ending>.safetensors` is written; makes its folder.

    Raises FrugalError for a prefix that is empty or leads out of the models folder.
    """
    folder = _folder()
    path = (folder / f"{prefix.strip()}_{ending}{SUFFIX}").resolve()
    if not prefix.strip() or prefix.strip().endswith(("/", "\\")) or folder not in path.parents:
        raise FrugalError(
            f"the name {ascii(prefix)[:60]}",
            f"a file name inside models/{FOLDER}",
            "type a plain name",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def listed(path: Path) -> str:
    """The name of a file from `output_path` as loaders list it."""
    return str(path.relative_to(_folder()))


def _folder() -> Path:
    folders = [Path(folder).resolve() for folder in folder_paths.get_folder_paths(FOLDER)]
    # ComfyUI lists the folder of the old name first.
    return next((place for place in folders if place.name == FOLDER), folders[0])


def shown_progress(stages: Mapping[str, str], say: Callable[[str], None]) -> Progress:
    """ComfyUI's progress bar, which also asks for its cancel button; `say` gets what `stages` calls
    a stage when it begins.
    """
    bar, last = comfy.utils.ProgressBar(TICKS), ["", -1]

    def progress(stage: str, done: float, total: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        tick = int(TICKS * done / total) if total else TICKS
        if stage != last[0]:
            say(stages[stage])
        if [stage, tick] != last:
            last[:] = [stage, tick]
            bar.update_absolute(tick, TICKS)

    return progress


def merge_of(weights: Weights, loras: list[tuple[Path, float]]) -> Merge | None:
    """The LoRA files with their strengths as changes to these weights."""
    return LoraMerge(weights, loras) if loras else None


def convert(
    job: Job, loras: list[tuple[Path, float]], say: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Do a job with ComfyUI's progress bar and cancelling; `say` gets a line about the stage."""
    if job.device.type != "cpu":
        comfy.model_management.free_memory(MEMORY, job.device)
    progress = shown_progress(
        {"measure": "measuring every layer in every format", "write": "writing"}, say
    )

    ended = False
    try:
        outcome = run(job, lambda weights: merge_of(weights, loras), progress, structure)
        ended = True
    finally:
        kept = [job.output.with_name(job.output.name + end) for end in (PART, CURVES)]
        if not ended and any(path.exists() for path in kept):
            text = (
                "what is done is kept: queue the same again to resume, or delete "
                f"{job.output.name}{PART}*"
            )
            LOG.warning("[Frugal] %s", text)
            say(text)
    return outcome
