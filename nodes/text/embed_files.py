"""Where text embeddings live: models/text_embeds to read, output/text_embeds to write and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from ...kernels.checkpoints.text_embeds import read_text_embeds, write_text_embeds
from ...kernels.errors import FrugalError
from .._models import state_of
from .._output import folder_of, names_in, next_path, within

FOLDER = "text_embeds"
PLACES = f"models/{FOLDER} or output/{FOLDER}"
OUTPUT_MARK = " [output]"
SUFFIX = ".safetensors"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def names() -> list[str]:
    """Files to choose from, those of the output folder marked."""
    models = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]
    return models + [f"{name}{OUTPUT_MARK}" for name in names_in(FOLDER, SUFFIX)]


def save(conditioning: Any, prefix: str) -> Path:
    """Write a conditioning under the next free number; returns the path."""
    path = next_path(FOLDER, prefix, SUFFIX)
    write_text_embeds(conditioning, path)
    return path


def load(name: str) -> list[list[Any]]:
    """Read the chosen file as a conditioning."""
    return read_text_embeds(_path(name))


def fingerprint(name: str) -> str:
    """Changes when the file is replaced."""
    return state_of(_path(name))


def _path(name: str) -> Path:
    if name.endswith(OUTPUT_MARK):
        path = folder_of(FOLDER) / name.removesuffix(OUTPUT_MARK)
        found = path.resolve() if within(FOLDER, path) and path.is_file() else None
    else:
        found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise FrugalError(
            f"{name} is not there", f"a file in {FOLDER}", "refresh the list and choose again"
        )
    return Path(found)
