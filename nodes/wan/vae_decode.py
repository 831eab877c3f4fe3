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
from ...kernels.report import megabytes
from ...kernels.video.latent_file import SUFFIX, write_latent
from ...kernels.video.writer import FORMATS, VideoWriter
from .vae_halves import decoder_of, on_device, wan_decoder
from .vae_stream import VaeStream

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
        self.batch, _, self.latents, self.height, self.width = self.samples.shape
        self.half = decoder_of(vae, self.latents, self.height, self.width)
        self.tile, self.overlap = tile // self.half.scale, overlap // self.half.scale
        self.frames = vae.upscale_ratio[0](self.latents)
        self.size = self.width * self.half.scale, self.height * self.half.scale
        self.done, self.notes, self.state = 0, [], 0
        self.bar = comfy.utils.ProgressBar(self.batch * self.frames)

    def pieces(self, item: int) -> Iterator[torch.Tensor]:
        """Frames [t, H, W, 3] of one clip in order, on the VAE's output device, 0 to 1."""
        vae, half = self.vae, self.half
        stream = VaeStream(vae, half, self.height, self.width, self.tile, self.overlap)
        stream.load()
        with on_device(vae):
            given = self.samples[item : item + 1].to(device=vae.device, dtype=vae.vae_dtype)
            inner = half.around(given).to(vae.output_device)
        del given
        for call in half.cadence.calls:
            comfy.model_management.throw_exception_if_processing_interrupted()
            made = stream.feed(inner[:, :, call.start : call.stop], call)
            pixels = half.seen(made)[0].movedim(0, -1)
            self.done += pixels.shape[0]
            yield pixels
            self.bar.update_absolute(self.done, None, ("JPEG", _picture(pixels[-1]), PREVIEW_SIDE))
        self.state = stream.state_bytes()
        self.notes += stream.notes
        self.notes += stream.seams("the first frame", "of a range of 1")

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
            f"in {len(self.half.cadence.calls)} pieces",
            f"ComfyUI's estimate for a piece: {megabytes(self.half.memory)}; "
            f"state kept between pieces: {megabytes(self.state)}",
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
    written: list[Path] = []
    unfinished: list[Path] = []

    def write() -> str:
        subfolder = ""
        for item in range(decoding.batch):
            folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
                prefix, folder_paths.get_output_directory(), width, height
            )
            path = Path(folder) / f"{name}_{number:05}_{FORMATS[format].suffix}"
            with VideoWriter(path, width, height, fps, format, quality, metadata) as writer:
                unfinished.append(writer.partial)
                try:
                    for pixels in decoding.pieces(item):
                        writer.write(_bytes(pixels))
                except comfy.model_management.InterruptProcessingException:
                    writer.cancel()
                    raise
            written.append(path)
        return subfolder

    subfolder = _kept_safe(decoding, write, unfinished)
    sizes = [f"{path.name}: {megabytes(path.stat().st_size)}" for path in written]
    return written, subfolder, "\n".join([decoding.report(), *sizes])


def _kept_safe(decoding: Decoding, work: Callable[[], Any], files: Sequence[Path] = ()) -> Any:
    """Do the work with the LATENT on disk until it is done: hours of sampling may be in it. files:
    unfinished ones that may be left when it fails.
    """
    folder, name, number, _, _ = folder_paths.get_save_image_path(
        KEPT, folder_paths.get_input_directory()
    )
    path = Path(folder) / f"{name}_{number:05}_{SUFFIX}"
    write_latent(decoding.samples, path)
    try:
        made = work()
    except comfy.model_management.InterruptProcessingException:
        path.unlink(missing_ok=True)
        raise
    except Exception as error:
        left = [f"the frames so far as {each.name}" for each in files if each.exists()]
        kept = " and ".join([f"the LATENT is kept as input/{path.name}", *left])
        raise FrugalError(
            f"decoding stopped after frame {decoding.done} of {decoding.batch * decoding.frames} "
            f"({ascii(str(error))[1:-1][:300].rstrip('.')}), {kept}",
            "to reach the last frame",
            f"choose {path.name} in 'Load Latent' and decode again, with tile_size {RETRY_TILE} if "
            "memory ran out",
        ) from error
    path.unlink(missing_ok=True)
    return made


def _check(vae: Any, samples: Any) -> None:
    channels = getattr(vae, "latent_channels", None)
    shape = None if getattr(samples, "is_nested", False) else tuple(samples.shape)
    if shape is None or len(shape) != 5 or shape[1] != channels or not all(shape):
        raise FrugalError(
            f"the LATENT has the shape {list(shape) if shape else 'of several parts'}",
            f"[batch, {channels}, frames, height, width] for this VAE",
            "connect the LATENT of a Wan sampler and the VAE of the same Wan version",
        )


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3], rounded to nearest."""
    return pixels[..., :3].float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(_bytes(pixels))
