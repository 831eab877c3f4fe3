"""A video that is decoded and written while its later blocks are still sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.report import megabytes
from ...kernels.video.latent_file import GrowingLatent
from ...kernels.video.writer import VideoWriter
from ..vae.clip_decoder import ClipDecoder
from ..vae.decode_run import bytes_of, check_pixels, kept_path, preview_of, video_path
from ..vae.halves import decoder_of, wan_decoder


@dataclass(frozen=True)
class Target:
    """Where the pictures go, as on the node. every: blocks that are decoded at a time; tile,
    overlap: pixels.
    """

    prefix: str
    fps: float
    format: str
    quality: str
    every: int = 1
    tile: int = 0
    overlap: int = 64
    metadata: Mapping[str, str] = field(default_factory=dict)


class LiveVideo:
    """One file per clip of a batch. A context manager: when it is left by an exception, the frames
    so far are playable files and the latents so far a LATENT on disk.

    picture: the last decoded frame, for a progress bar. Raises FrugalError for another VAE.
    """

    def __init__(self, vae: Any, target: Target):
        vae.throw_exception_if_invalid()
        wan_decoder(vae)
        self.vae, self.target = vae, target
        self.picture: Any = None
        self.paths: list[Path] = []
        self.subfolder = ""
        self.pieces = self.swaps = self.moved = self.state = 0
        self._waiting: list[torch.Tensor] = []
        self._files = contextlib.ExitStack()
        self._clips: list[tuple[ClipDecoder, VideoWriter]] = []
        self._kept: GrowingLatent | None = None

    def __enter__(self) -> LiveVideo:
        return self

    def start(self, shape: tuple[int, ...]) -> None:
        """shape: of the whole run's LATENT, [B, C, T, h, w]."""
        batch, channels, self.latents, height, width = shape
        if channels != self.vae.latent_channels:
            raise FrugalError(
                f"latents of {channels} channels and a VAE of {self.vae.latent_channels}",
                "the VAE of the model's own Wan version",
                "connect that VAE",
            )
        half, target = decoder_of(self.vae, self.latents, height, width), self.target
        size = width * half.scale, height * half.scale
        tile, overlap = target.tile // half.scale, target.overlap // half.scale
        for item in range(batch):
            path, self.subfolder = video_path(target.prefix, target.format, *size, item)
            writer = VideoWriter(
                path, *size, target.fps, target.format, target.quality, target.metadata
            )
            self._files.enter_context(writer)
            self.paths.append(path)
            self._clips.append((ClipDecoder(self.vae, half, height, width, tile, overlap), writer))
        try:
            self._kept = GrowingLatent(kept_path())
        except OSError as error:
            self._kept = GrowingLatent(None, str(error))

    def add(self, latents: torch.Tensor) -> bool:
        """The next latents of the LATENT, [B, C, t, h, w], a block; whether it, and what waited,
        was decoded now: then the VAE is on the device, and perhaps no other model.
        """
        assert self._kept is not None
        self._kept.add(latents)
        self._waiting.append(latents)
        if len(self._waiting) < self.target.every and not self.complete:
            return False
        block = torch.cat(self._waiting, dim=2)
        self._waiting = []
        for item, (clip, writer) in enumerate(self._clips):
            for pixels in clip.feed(block[item : item + 1]):
                check_pixels(pixels, writer.frames + len(pixels), self.vae)
                writer.write(bytes_of(pixels))
                self.picture = preview_of(pixels)
            clip.stream.rest()
        self.state = sum(clip.stream.state_bytes() for clip, _ in self._clips)
        self.pieces += 1
        return True

    @property
    def complete(self) -> bool:
        return self._kept is not None and self._kept.frames == self.latents

    def count_swap(self, size: int) -> None:
        """`size` bytes of the model's weights had to make room for the VAE, and come back."""
        self.swaps += size > 0
        self.moved += max(0, size)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_) -> None:
        if kind is None and not self.complete and self._kept is not None:
            kind, error = RuntimeError, RuntimeError("not all latents came")
        self._files.__exit__(kind, error, None)
        if self._kept is None or not self._kept.frames:
            return
        if kind is None:
            self._kept.remove()
            return
        self._kept.write()
        left = self._left()
        LOG.warning("[Frugal] %s", left)
        if isinstance(error, Exception) and not _cancelled(error):
            # A cause that is known has a remedy of its own, and comes first.
            first, cause = [], str(error)
            if isinstance(error, FrugalError):
                first, cause = [error.do], error.found
            said = ascii(cause)[1:-1][:300].rstrip(".")
            raise FrugalError(
                f"{self._stopped()} ({said}), {left}",
                "to reach the last frame",
                ", then ".join([*first, self._go_on()]),
            ) from error

    def _stopped(self) -> str:
        assert self._kept is not None
        if self.complete:
            return f"all {self.latents} latent frames were sampled, and decoding them failed"
        return f"sampling stopped after latent frame {self._kept.frames} of {self.latents}"

    def _go_on(self) -> str:
        """The remedy: what to do with what is there."""
        assert self._kept is not None
        if not (self._kept.kept and self._kept.path):
            return "run again"
        if self.complete:
            return f"load {self._kept.path.name} with 'Load Latent' and decode it"
        return (
            f"load {self._kept.path.name} with 'Load Latent' and connect it as start_latent to go "
            "on"
        )

    def _left(self) -> str:
        assert self._kept is not None
        files = [writer.partial for _, writer in self._clips if writer.partial.exists()]
        names = [f"the frames so far as {each.name}" for each in files]
        kept = f"no LATENT could be written ({self._kept.problem})"
        if self._kept.kept and self._kept.path:
            kept = f"{self._kept.kept} latent frames are kept as input/{self._kept.path.name}"
        return " and ".join([kept, *names])

    def report(self) -> str:
        """What was decoded and what it cost, as text."""
        lines = [
            f"{path.name}: {writer.frames} frames, {megabytes(path.stat().st_size)}"
            for path, (_, writer) in zip(self.paths, self._clips, strict=True)
        ]
        swaps = f"the model's weights made room {self.swaps} times ({megabytes(self.moved)} in all)"
        lines.append(
            f"decoded {self.pieces} times while sampling, {self.target.every} block(s) at a time: "
            + (swaps if self.swaps else "the model's weights never had to make room")
        )
        lines.append(f"state of the VAE between chunks: {megabytes(self.state)} of main memory")
        notes = [note for clip, _ in self._clips for note in clip.notes()]
        notes += [writer.note for _, writer in self._clips if writer.note]
        if self._kept is not None and self._kept.problem:
            notes.append(f"the LATENT could not be kept while sampling ({self._kept.problem})")
        return "\n".join(lines + [f"note: {note}" for note in notes])


def _cancelled(error: Exception) -> bool:
    return isinstance(error, comfy.model_management.InterruptProcessingException)
