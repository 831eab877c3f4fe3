"""Where text embeddings live: models/text_embeds to read, output/text_embeds to write and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from ...kernels.checkpoints.text_embeds import read_text_embeds, write_text_embeds
from ...kernels.errors import FrugalError
from .._models import state_of

FOLDER = "text_embeds"
OUTPUT_MARK = " [output]"
SUFFIX = ".safetensors"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def names() -> list[str]:
    """Files to choose from, those of the output folder marked."""
    models = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]
    output = _output_folder()
    written = [
        f"{path.relative_to(output).as_posix()}{OUTPUT_MARK}"
        for path in sorted(output.rglob(f"*{SUFFIX}"))
    ]
    return models + written


def save(conditioning: Any, prefix: str) -> Path:
    """Write a conditioning under the next free number; returns the path."""
    if not prefix.strip():
        raise FrugalError("the file name is empty", "a name", "type a file name")
    output = folder_paths.get_output_directory()
    folder, name, number, _, _ = folder_paths.get_save_image_path(f"{FOLDER}/{prefix}", output)
    path = Path(folder) / f"{name}_{number:05}_{SUFFIX}"
    if _output_folder() not in path.resolve().parents:
        raise FrugalError(
            f"the name {ascii(prefix)[:60]} leads out of output/{FOLDER}",
            "a name inside it",
            "type a plain name",
        )
    write_text_embeds(conditioning, path)
    return path


def load(name: str) -> list[list[Any]]:
    """Read the chosen file as a conditioning."""
    return read_text_embeds(_path(name))


def fingerprint(name: str) -> str:
    """Changes when the file is replaced."""
    return state_of(_path(name))


def _output_folder() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / FOLDER


def _path(name: str) -> Path:
    if name.endswith(OUTPUT_MARK):
        path = (_output_folder() / name.removesuffix(OUTPUT_MARK)).resolve()
        found = path if _output_folder() in path.parents and path.is_file() else None
    else:
        found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise FrugalError(
            f"{name} is not there", f"a file in {FOLDER}", "refresh the list and choose again"
        )
    return Path(found)
