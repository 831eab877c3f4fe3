"""Sessions on disk: output/causal_sessions."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths

from ...kernels.errors import FrugalError
from ...kernels.kv import session_file
from ...kernels.kv.cache import VideoCache
from .._models import state_of

FOLDER, SUFFIX = "causal_sessions", ".safetensors"


def names() -> list[str]:
    folder = _folder()
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob(f"*{SUFFIX}"))]


def save(session: VideoCache, prefix: str) -> Path:
    """Write under the next free number; returns the path. Raises FrugalError for a name that leads
    out of the folder.
    """
    if not prefix.strip():
        raise FrugalError("the file name is empty", "a name", "type a file name")
    output = folder_paths.get_output_directory()
    folder, name, number, _, _ = folder_paths.get_save_image_path(f"{FOLDER}/{prefix}", output)
    path = Path(folder) / f"{name}_{number:05}_{SUFFIX}"
    _inside(path, prefix)
    session_file.save(session, path)
    return path


def load(name: str) -> VideoCache:
    return session_file.load(_path(name), comfy.model_management.get_torch_device())


def fingerprint(name: str) -> str:
    """Changes when the file is replaced."""
    return state_of(_path(name))


def _folder() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / FOLDER


def _path(name: str) -> Path:
    path = _folder() / name
    _inside(path, name)
    if not path.is_file():
        raise FrugalError(f"{name!a} is gone", f"a file in output/{FOLDER}", "choose another")
    return path


def _inside(path: Path, name: str) -> None:
    if _folder() not in path.resolve().parents:
        raise FrugalError(
            f"the name {ascii(name)[:60]} leads out of output/{FOLDER}",
            "a name inside it",
            "type a plain name",
        )
