"""A latent on disk, as ComfyUI's 'Load Latent' reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..whole_file import replacing

LATENT = "latent_tensor"
# Its presence says that values are not scaled by 1 / 0.18215.
VERSION = "latent_format_version_0"
SUFFIX = ".latent"


def write_latent(samples: torch.Tensor, path: Path) -> None:
    """Write a latent of any shape and type bit for bit; the name appears once the file is whole."""
    tensors = {LATENT: samples.detach().cpu().contiguous(), VERSION: torch.tensor([])}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished)
