"""One clip through a VAE's decoder as its latents come, all at once or a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch

from .halves import Half, on_device
from .stream import OVERLAP, VaeStream


class ClipDecoder:
    """half: the decoder for the length of the whole clip, whose calls take latents as ComfyUI's own
    loop does, however they arrive. height, width, tile, overlap: in latent pixels, as VaeStream.
    """

    def __init__(
        self, vae: Any, half: Half, height: int, width: int, tile: int = 0, overlap: int = OVERLAP
    ):
        self.vae, self.half = vae, half
        self.stream = VaeStream(vae, half, height, width, tile, overlap)
        self.taken = self.calls = 0
        self._waiting: torch.Tensor | None = None

    def feed(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """The next latents [1, C, t, h, w] -> frames [n, H, W, 3] of each call that has all of its
        latents, on the VAE's output device, 0 to 1. Those of a call to come are kept.
        """
        vae, half = self.vae, self.half
        self.stream.load()
        with on_device(vae):
            given = latents.to(device=vae.device, dtype=vae.vae_dtype)
            inner = half.around(given).to(vae.output_device)
        del given
        if self._waiting is not None:
            inner = torch.cat([self._waiting, inner], dim=2)
        first = self.taken
        for call in half.cadence.calls[self.calls :]:
            if call.stop - first > inner.shape[2]:
                break
            comfy.model_management.throw_exception_if_processing_interrupted()
            made = self.stream.feed(inner[:, :, call.start - first : call.stop - first], call)
            self.taken, self.calls = call.stop, self.calls + 1
            yield half.seen(made)[0].movedim(0, -1)
        # A copy, or all latents of the piece would live on behind the few that wait.
        self._waiting = inner[:, :, self.taken - first :].clone()

    def notes(self) -> list[str]:
        """What was done about memory, and what tiles changed, in words."""
        return self.stream.notes + self.stream.seams("the first frame", "of a range of 1")
