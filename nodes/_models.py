"""Model files as the families offer them: one list, one way from a name to its file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import folder_paths

from ..kernels.checkpoints.gguf_file import SUFFIX as GGUF
from ..kernels.checkpoints.source import INDEX_SUFFIX, SHARD
from ..kernels.errors import FrugalError

FOLDER = "diffusion_models"
# Where public files lie, for the sentence about a file that is not there.
WAN_PAGE = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged"


def model_names() -> list[str]:
    """Files to choose from: every model file, GGUF too, and one index in place of the parts it
    lists.
    """
    indexes, blocks = [], []
    for folder in folder_paths.get_folder_paths(FOLDER):
        for place, _, files in os.walk(folder, followlinks=True):
            inside = os.path.relpath(place, folder)
            for name in files:
                kind = blocks if name.lower().endswith(GGUF) else indexes
                if kind is blocks or name.endswith(INDEX_SUFFIX):
                    kind.append(os.path.normpath(os.path.join(inside, name)))
    stems = {name.removesuffix(INDEX_SUFFIX) for name in indexes}
    singles = [
        name
        for name in folder_paths.get_filename_list(FOLDER)
        if SHARD.split(name)[0] not in stems or name in stems
    ]
    return sorted({*singles, *indexes, *blocks})


def file_path(kind: str, name: str) -> Path:
    """The full path of a file chosen from a models folder. Raises FrugalError if it is gone."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise FrugalError(
            f"{name} is not there", f"a file in models/{kind}", "refresh the list and choose again"
        )
    return Path(path)


def offered(
    name: str | None, names: Collection[str], folder: str, source: str | None = None
) -> bool | str:
    """For a loader's `validate_inputs`: True if the chosen name is among those on offer, else the
    sentence that says which file is missing, in which folder, and where it comes from.

    name: None if another node gives it. folder: as people find it, "models/loras". source: address
    of a page that has the public file. ComfyUI's own sentence for this lists the names, and nothing
    to do.
    """
    if name is None or name in names:
        return True
    here = f"{ascii(name)[1:-1]} is not in" if name else "nothing is chosen from"
    some = f"one of the {len(names)} files" if names else "a file"
    do = f"download it from {source} and put it there" if source else "copy it there"
    return str(
        FrugalError(f"{here} {folder}", f"{some} there", f"{do}, then press R to refresh the lists")
    )


def model_offered(name: str | None) -> bool | str:
    """`offered` for a name from `model_names`."""
    return offered(name, model_names(), f"models/{FOLDER}", WAN_PAGE)


def model_path(name: str) -> Path:
    """The full path of a file chosen from `model_names`. Raises FrugalError if it is gone."""
    return file_path(FOLDER, name)


def state_of(*paths: Path) -> str:
    """Changes when one of the files is replaced."""
    states = [(path.name, path.stat()) for path in paths]
    return ";".join(f"{name}:{state.st_size}:{state.st_mtime_ns}" for name, state in states)


def fingerprint(name: str) -> str:
    """Changes when the chosen file, or the index or a part of a model in parts, is replaced."""
    path = model_path(name)
    parts = []
    if path.name.endswith(INDEX_SUFFIX):
        parts = sorted(path.parent.glob(f"{path.name.removesuffix(INDEX_SUFFIX)}-*"))
    return state_of(path, *parts)
