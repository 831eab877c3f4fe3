"""A latent on disk, as ComfyUI's 'Load Latent' reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from ..tensor_file import write_tensors

LATENT = "latent_tensor"
# Its presence says that values are not scaled by 1 / 0.18215.
VERSION = "latent_format_version_0"
SUFFIX = ".latent"


def write_latent(samples: torch.Tensor, path: Path) -> None:
    """Write a latent of any shape and type bit for bit; the name appears once the file is whole."""
    tensors = {LATENT: samples.detach().cpu().contiguous(), VERSION: torch.tensor([])}
    write_tensors(path, tensors)


class GrowingLatent:
    """Latents as they are made, [B, C, t, h, w] at a time, kept in a file that is whole at every
    moment. A file cannot grow along time in place, so it is rewritten each time a quarter has
    come since: five times the final size in all, and a process that dies loses at most a fifth.

    path: None for nowhere. problem: why the file could not be written last time, "" if it could. No
    reason to stop: the file is needed only if something else does.
    """

    def __init__(self, path: Path | None, problem: str = ""):
        self.path, self.frames, self.problem = path, 0, problem
        self._parts: list[torch.Tensor] = []
        self._written = 0

    def add(self, latents: torch.Tensor) -> None:
        self._parts.append(latents.detach().cpu())
        self.frames += latents.shape[2]
        if self.frames >= 1.25 * self._written:
            self.write()

    def write(self) -> None:
        """All of them, now."""
        if self._written < self.frames and self.path is not None:
            self._parts = [torch.cat(self._parts, dim=2)]
            try:
                write_latent(self._parts[0], self.path)
            except OSError as error:
                self.problem = str(error)
                return
            self._written, self.problem = self.frames, ""

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def kept(self) -> int:
        """Frames in the file."""
        return self._written
