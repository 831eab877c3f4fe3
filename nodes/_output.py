"""Files that the pack writes into a folder of their own below ComfyUI's output folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..kernels.errors import FrugalError


def folder_of(kind: str) -> Path:
    """output/<kind>, there or not."""
    return Path(folder_paths.get_output_directory()).resolve() / kind


def names_in(kind: str, suffix: str) -> list[str]:
    """Files there that end in `suffix`, below it too, as names relative to it."""
    folder = folder_of(kind)
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob(f"*{suffix}"))]


def within(kind: str, path: Path) -> bool:
    """Whether `path` lies in that folder once links and `..` are followed."""
    return folder_of(kind) in path.resolve().parents


def free_number(
    prefix: str, parent: str = "", width: int = 0, height: int = 0
) -> tuple[Path, str, int, str]:
    """(folder, name, first free number, folder inside output) for files NAME_NUMBER_... of this
    prefix below `parent`, ComfyUI's output folder by default.

    ComfyUI's own function counts from 1 again where a prefix ends in a slash or a dot.
    """
    folder, name, number, inside, _ = folder_paths.get_save_image_path(
        _with_a_name(prefix), parent or folder_paths.get_output_directory(), width, height
    )
    there = {path.name for path in Path(folder).iterdir()}
    while any(each.startswith(f"{name}_{number:05}_") for each in there):
        number += 1
    return Path(folder), name, number, inside


def next_path(kind: str, prefix: str, suffix: str) -> Path:
    """`prefix` with the next free number. Raises FrugalError for a name that is empty or leads out
    of the folder.
    """
    folder, name, number, _ = free_number(f"{kind}/{_with_a_name(prefix)}")
    path = folder / f"{name}_{number:05}_{suffix}"
    check_within(kind, path, prefix)
    return path


def _with_a_name(prefix: str) -> str:
    """The prefix without the slashes and dots at its end. Raises FrugalError if nothing is left."""
    plain = prefix.rstrip("/\\. ")
    if not plain:
        raise FrugalError("the file name is empty", "a name", "type a file name")
    return plain


def check_within(kind: str, path: Path, name: str) -> None:
    """Raises FrugalError, about the typed `name`, unless `path` lies in the folder."""
    if not within(kind, path):
        raise FrugalError(
            f"the name {ascii(name)[:60]} leads out of output/{kind}",
            "a name inside it",
            "type a plain name",
        )
