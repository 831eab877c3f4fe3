"""Model files as the families offer them: one list, one way from a name to its file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import folder_paths

from ..kernels.checkpoints.gguf_file import SUFFIX as GGUF
from ..kernels.checkpoints.source import INDEX_SUFFIX, PICKLES, SHARD, index_of, parts_of
from ..kernels.errors import FrugalError

FOLDER = "diffusion_models"
# Where public files lie, for the sentence about a file that is not there.
WAN_PAGE = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged"


def model_names() -> list[str]:
    """Files to choose from: every model file, GGUF too, and one index in place of the parts it
    lists.
    """
    indexes, blocks, parts = [], [], set()
    for folder in folder_paths.get_folder_paths(FOLDER):
        for place, _, files in os.walk(folder, followlinks=True):
            inside = os.path.relpath(place, folder)
            for name in files:
                kind = blocks if name.lower().endswith(GGUF) else indexes
                if kind is blocks or name.endswith(INDEX_SUFFIX):
                    kind.append(os.path.normpath(os.path.join(inside, name)))
                if name.endswith(INDEX_SUFFIX):
                    listed = _parts(Path(place, name))
                    own = {os.path.normpath(os.path.join(inside, part.name)) for part in listed}
                    parts |= own if len(own) > 1 else set()
    stems = {name.removesuffix(INDEX_SUFFIX) for name in indexes}
    singles = [
        name
        for name in folder_paths.get_filename_list(FOLDER)
        if (SHARD.split(name)[0] not in stems or name in stems) and name not in parts
    ]
    return sorted({*singles, *indexes, *blocks})


def _parts(index: Path) -> tuple[Path, ...]:
    """The files that an index lists; none where it cannot be read, which its loader will say."""
    try:
        return parts_of(index)
    except FrugalError:
        return ()


def file_path(kind: str, name: str) -> Path:
    """The full path of a file chosen from a models folder. Raises FrugalError if it is gone."""
    path = folder_paths.get_full_path(kind, name) or folder_paths.get_full_path(
        kind, _slashes(name)
    )
    if path is None:
        raise FrugalError(
            f"{name} is not there", f"a file in models/{kind}", "refresh the list and choose again"
        )
    return Path(path)


def _slashes(name: str) -> str:
    """A name from a graph that was saved on Windows, as other systems write it."""
    return name.replace("\\", "/")


def offered(
    name: str | None, names: Collection[str], folder: str, source: str | None = None
) -> bool | str:
    """For a loader's `validate_inputs`: True if the chosen name is among those on offer, else the
    sentence that says which file is missing, in which folder, and where it comes from.

    name: None if another node gives it. folder: as people find it, "models/loras". source: address
    of a page that has the public file. ComfyUI's own sentence for this lists the names, and nothing
    to do.
    """
    if name is None or name in names or _slashes(name) in map(_slashes, names):
        return True
    there = _not_on_offer(name, folder, source) if name else None
    if there is not None:
        return str(there)
    here = f"{ascii(name)[1:-1]} is not in" if name else "nothing is chosen from"
    some = f"one of the {len(names)} files" if names else "a file"
    do = f"download it from {source} and put it there" if source else "copy it there"
    return str(
        FrugalError(f"{here} {folder}", f"{some} there", f"{do}, then press R to refresh the lists")
    )


def _not_on_offer(name: str, folder: str, source: str | None) -> FrugalError | None:
    """What to say of a file that is in the folder and cannot be chosen; None if it is not there."""
    kind = folder.removeprefix("models/")
    known = kind in folder_paths.folder_names_and_paths
    places = folder_paths.get_folder_paths(kind) if known else []
    path = next((p for p in (Path(place, _slashes(name)) for place in places) if p.is_file()), None)
    if path is None:
        return None
    index, suffix = index_of(path), path.suffix.lower()
    do = "convert it to safetensors, or use a safetensors file of the same model"
    if source is not None and kind == "text_encoders":
        do = f"use the safetensors file of the same encoder, from {source}"
    if index is not None:
        what, do = f"a part of {index.name}", "choose that entry, which loads all parts"
    elif suffix == GGUF:
        what = "a GGUF file"
        if kind == "text_encoders":
            do += ", or load it with a GGUF CLIP loader and use CLIP Text Encode"
    elif suffix in PICKLES:
        what = "a PyTorch file"
    else:
        what = f"a file of the kind '{ascii(suffix)[1:-1]}'"
    return FrugalError(
        f"{ascii(_slashes(name))[1:-1]} is in {folder} and is {what}", "a file that is listed", do
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
    parts = _parts(path) if path.name.endswith(INDEX_SUFFIX) else ()
    gone = [part.name for part in parts if not part.is_file()]
    return ";".join([state_of(path, *(part for part in parts if part.is_file())), *gone])
