"""LATENT to pictures or to video files, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.report import megabytes
from ...kernels.video.latent_file import SUFFIX, write_latent
from ...kernels.video.writer import FORMATS, VideoWriter
from .._output import free_number
from .clip_decoder import ClipDecoder
from .halves import decoder_of, wan_decoder

KEPT = "frugal_undecoded"
PREVIEW_SIDE = 512
RETRY_TILE = 256


class Decoding:
    """One LATENT on its way through a VAE's decoder.

    latent: samples [B, C, T, h, w]; other entries such as a noise mask do not matter here. tile,
    overlap: pixels, tile 0 for whole frames. Raises FrugalError for another VAE or LATENT.
    """

    def __init__(self, vae: Any, latent: dict[str, Any], tile: int = 0, overlap: int = 64):
        vae.throw_exception_if_invalid()
        wan_decoder(vae)
        self.vae, self.samples = vae, latent["samples"]
        _check(vae, self.samples)
        _check_finite(self.samples)
        self.batch, _, self.latents, self.height, self.width = self.samples.shape
        self.half = decoder_of(vae, self.latents, self.height, self.width)
        self.tile, self.overlap = tile // self.half.scale, overlap // self.half.scale
        self.frames = vae.upscale_ratio[0](self.latents)
        self.size = self.width * self.half.scale, self.height * self.half.scale
        self.done, self.notes, self.state = 0, [], 0
        self.bar = comfy.utils.ProgressBar(self.batch * self.frames)

    def pieces(self, item: int) -> Iterator[torch.Tensor]:
        """Frames [t, H, W, 3] of one clip in order, on the VAE's output device, 0 to 1."""
        clip = ClipDecoder(self.vae, self.half, self.height, self.width, self.tile, self.overlap)
        for pixels in clip.feed(self.samples[item : item + 1]):
            self.done += pixels.shape[0]
            check_pixels(pixels, self.done, self.vae)
            yield pixels
            self.bar.update_absolute(self.done, None, preview_of(pixels))
        self.state = clip.stream.state_bytes()
        self.notes += clip.notes()

    def images(self) -> torch.Tensor:
        """All frames of all clips, [B * T, H, W, 3], in one tensor made once."""
        out: torch.Tensor | None = None
        place = 0
        for item in range(self.batch):
            for pixels in self.pieces(item):
                if out is None:
                    shape = (self.batch * self.frames, *pixels.shape[1:])
                    out = torch.empty(shape, dtype=pixels.dtype, device=pixels.device)
                out[place : place + pixels.shape[0]] = pixels
                place += pixels.shape[0]
        assert out is not None and place == out.shape[0]
        return out

    def report(self) -> str:
        """What was done, as text."""
        width, height = self.size
        clips = f"{self.batch} clips of " if self.batch > 1 else ""
        lines = [
            f"decoded {clips}{self.frames} frames {width} x {height} from {self.latents} latents, "
            f"in {len(self.half.cadence.calls)} chunks",
            f"ComfyUI's estimate for a chunk: {megabytes(self.half.memory)}; "
            f"state kept between chunks: {megabytes(self.state)}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def to_images(vae: Any, latent: dict[str, Any], tile: int, overlap: int) -> tuple[Any, str]:
    """(IMAGE, report). Raises FrugalError; the LATENT is on disk then."""
    decoding = Decoding(vae, latent, tile, overlap)
    images = _kept_safe(decoding, decoding.images)
    return images, decoding.report()


def to_files(
    vae: Any,
    latent: dict[str, Any],
    prefix: str,
    fps: float,
    format: str,
    quality: str,
    tile: int,
    overlap: int,
    metadata: Mapping[str, str],
) -> tuple[list[Path], str, str]:
    """(one file per clip, their folder inside output, report); errors as `to_images`."""
    decoding = Decoding(vae, latent, tile, overlap)
    width, height = decoding.size
    # Before the work: a name that cannot be, or a folder that cannot be made.
    video_path(prefix, format, width, height)
    written: list[Path] = []
    unfinished: list[Path] = []

    def write() -> str:
        subfolder = ""
        for item in range(decoding.batch):
            path, subfolder = video_path(prefix, format, width, height)
            with VideoWriter(path, width, height, fps, format, quality, metadata) as writer:
                unfinished.append(writer.partial)
                try:
                    for pixels in decoding.pieces(item):
                        writer.write(bytes_of(pixels))
                except comfy.model_management.InterruptProcessingException:
                    writer.cancel()
                    raise
            written.append(path)
            decoding.notes += [writer.note] if writer.note else []
        return subfolder

    subfolder = _kept_safe(decoding, write, unfinished)
    sizes = [f"{path.name}: {megabytes(path.stat().st_size)}" for path in written]
    return written, subfolder, "\n".join([decoding.report(), *sizes])


def _kept_safe(decoding: Decoding, work: Callable[[], Any], files: Sequence[Path] = ()) -> Any:
    """Do the work with the LATENT on disk until it is done: hours of sampling may be in it. files:
    unfinished ones that may be left when it fails.
    """
    path = _kept(decoding)
    try:
        made = work()
    except comfy.model_management.InterruptProcessingException:
        if path is not None:
            path.unlink(missing_ok=True)
        raise
    except Exception as error:
        left = [f"the frames so far as {each.name}" for each in files if each.exists()]
        found, do = error.args[0] if error.args else type(error).__name__, "decode again"
        if path is not None:
            left.insert(0, f"the LATENT is kept as input/{path.name}")
            do = f"choose {path.name} in 'Load Latent' and {do}"
        if isinstance(error, FrugalError):
            # A cause that is known has a remedy of its own, and comes first.
            found, do = error.found, f"{error.do}, then {do}"
        else:
            do = f"{do}, with tile_size {RETRY_TILE} if memory ran out"
        raise FrugalError(
            f"decoding stopped after frame {decoding.done} of {decoding.batch * decoding.frames} "
            f"({ascii(str(found))[1:-1][:300].rstrip('.')}), {' and '.join(left)}".rstrip(", "),
            "to reach the last frame",
            do,
        ) from error
    if path is not None:
        path.unlink(missing_ok=True)
    return made


def _kept(decoding: Decoding) -> Path | None:
    """Where the LATENT is on disk now; None, and a note, where that cannot be: decoding needs it
    only if it fails.
    """
    try:
        path = kept_path()
        write_latent(decoding.samples, path)
        return path
    except OSError as error:
        note = f"the LATENT is not kept on disk while it is decoded ({error})"
        LOG.warning("[Frugal] %s", note)
        decoding.notes.append(note)
        return None


def kept_path() -> Path:
    """Where a LATENT waits until it is decoded: 'Load Latent' lists it there."""
    folder, name, number, _ = free_number(KEPT, folder_paths.get_input_directory())
    return folder / f"{name}_{number:05}_{SUFFIX}"


def video_path(
    prefix: str, format: str, width: int, height: int, after: int = 0
) -> tuple[Path, str]:
    """(file with the next free number, its folder inside output). after: numbers to leave for files
    that are not there yet.
    """
    folder, name, number, subfolder = free_number(prefix, width=width, height=height)
    return folder / f"{name}_{number + after:05}_{FORMATS[format].suffix}", subfolder


def _check(vae: Any, samples: Any) -> None:
    channels = getattr(vae, "latent_channels", None)
    shape = None if getattr(samples, "is_nested", False) else tuple(samples.shape)
    if shape is None or len(shape) != 5 or shape[1] != channels or not all(shape):
        raise FrugalError(
            f"the LATENT has the shape {list(shape) if shape else 'of several parts'}",
            f"[batch, {channels}, frames, height, width] for this VAE",
            "connect the LATENT of a Wan sampler and the VAE of the same Wan version",
        )


def _check_finite(samples: torch.Tensor) -> None:
    """Raises FrugalError for a LATENT that would decode to black or torn frames."""
    broken = ~samples.isfinite().all(dim=1).flatten(2).all(dim=2)
    if broken.any():
        frames = broken.any(dim=0).nonzero().flatten().tolist()
        raise FrugalError(
            f"the LATENT has NaN or infinite values in {len(frames)} of {samples.shape[2]} latent "
            f"frames, the first of them {frames[0]}",
            "finite numbers",
            "sample again with preset off and without an Attention node; if that gives the same, "
            "load the model with another weight type",
        )


def check_pixels(pixels: torch.Tensor, done: int, vae: Any) -> None:
    """Raises FrugalError for frames [n, H, W, 3], the last of them number `done`, that are not
    finite.
    """
    if not pixels.isfinite().all():
        raise FrugalError(
            f"the VAE made NaN or infinite pixels before frame {done}, computing in "
            f"{str(vae.vae_dtype).removeprefix('torch.')}",
            "finite numbers",
            "start ComfyUI with --fp32-vae",
        )


def bytes_of(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of pixels 0 to 1, rounded to nearest."""
    return pixels[..., :3].float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()


def preview_of(pixels: torch.Tensor) -> tuple[str, Image.Image, int]:
    """The last of frames [N, H, W, 3] as ComfyUI's progress bars show pictures."""
    return "JPEG", Image.fromarray(bytes_of(pixels[-1])), PREVIEW_SIDE
