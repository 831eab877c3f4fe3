"""Files that the pack writes into a folder of their own below ComfyUI's output folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ..kernels.errors import FrugalError

# Bytes of one part of a prefix: file systems take 255, and a number and an ending follow.
LONGEST = 220


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
    prefix = _with_a_name(prefix)
    if not parent:
        # ComfyUI's own sentence for this is three lines of paths.
        check_within("", folder_of("") / prefix, prefix)
    folder, name, number, inside, _ = folder_paths.get_save_image_path(
        prefix, parent or folder_paths.get_output_directory(), width, height
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


def prefix_problem(kind: str, prefix: str | None) -> bool | str:
    """For the `validate_inputs` of a node that writes below output/<kind>: True, or the sentence
    that says why no file can have this prefix. prefix: None if another node gives it.
    """
    try:
        if prefix is not None:
            check_within(kind, folder_of(kind) / _with_a_name(prefix), prefix)
    except FrugalError as error:
        return str(error)
    return True


def _with_a_name(prefix: str) -> str:
    """The prefix without the slashes and dots at its end. Raises FrugalError if nothing is left, or
    if a part is too long for a name.
    """
    plain = prefix.rstrip("/\\. ")
    if not plain:
        raise FrugalError("the file name is empty", "a name", "type a file name")
    longest = max(len(os.fsencode(part)) for part in re.split(r"[/\\]", plain))
    if longest > LONGEST:
        raise FrugalError(
            f"{ascii(plain)[1:41]}... has a part of {longest} bytes",
            f"at most {LONGEST}, to which a number and an ending are added",
            "shorten the file name",
        )
    return plain


def check_within(kind: str, path: Path, name: str) -> None:
    """Raises FrugalError, about the typed `name`, unless `path` lies in the folder."""
    if not within(kind, path):
        raise FrugalError(
            f"the name {ascii(name)[:60]} leads out of {Path('output', kind).as_posix()}",
            "a name inside it",
            "type a plain name",
        )
