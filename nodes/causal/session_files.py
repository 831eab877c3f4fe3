"""Sessions on disk: output/causal_sessions."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management

from ...kernels.causal import session_file
from ...kernels.causal.cache import VideoCache
from ...kernels.errors import FrugalError
from .._models import state_of
from .._output import check_within, folder_of, names_in, next_path

FOLDER, SUFFIX = "causal_sessions", ".safetensors"


def names() -> list[str]:
    """Sessions there, to choose from."""
    return names_in(FOLDER, SUFFIX)


def save(session: VideoCache, prefix: str) -> Path:
    """Write under the next free number; returns the path. Raises FrugalError for a name that leads
    out of the folder.
    """
    path = next_path(FOLDER, prefix, SUFFIX)
    session_file.save(session, path)
    return path


def load(name: str) -> VideoCache:
    """The session of that name. Raises FrugalError if it is gone or damaged."""
    return session_file.load(_path(name), comfy.model_management.get_torch_device())


def fingerprint(name: str) -> str:
    """Changes when the file is replaced."""
    return state_of(_path(name))


def _path(name: str) -> Path:
    path = folder_of(FOLDER) / name
    check_within(FOLDER, path, name)
    if not path.is_file():
        raise FrugalError(
            f"{name!a} is gone",
            f"a file in output/{FOLDER}",
            "press R to refresh the list and choose a session that is there",
        )
    return path
