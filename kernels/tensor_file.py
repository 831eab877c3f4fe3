"""Small safetensors files, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .atomic_write import atomic_write


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous CPU tensors of any shape and type under `path`.

    Raises WriteError where the disk or the name is to blame.
    """
    with atomic_write(path) as unfinished:
        try:
            save_file(tensors, unfinished, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> Exception:
    """The library tells a full disk by words alone."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return error
    code = int(number[1])
    return (
        OSError(0, str(error), None, code) if os.name == "nt" else OSError(code, os.strerror(code))
    )
