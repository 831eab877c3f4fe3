"""Pictures or a VIDEO to LATENT, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import InputImpl

from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from ...kernels.video import reader
from .halves import encoder_of, wan_encoder
from .stream import VaeStream


def encode(
    vae: Any, images: torch.Tensor | None, video: Any, tile: int, overlap: int
) -> tuple[dict[str, torch.Tensor], str]:
    """(LATENT with samples [1, C, T, h, w], report).

    images: [N, H, W, C], 0 to 1. video: a VIDEO; one of the two. tile, overlap: pixels, tile 0 for
    whole frames. Raises FrugalError for none or both, another VAE, and no frames.
    """
    vae.throw_exception_if_invalid()
    wan_encoder(vae)
    if (images is None) == (video is None):
        found = "neither images nor a video" if images is None else "both images and a video"
        raise FrugalError(
            f"{found} are connected", "one of the two", "connect images or a video, not both"
        )
    if images is None and not isinstance(video, InputImpl.VideoFromFile):
        images = video.get_components().images
    count, height, width = _of_file(video) if images is None else tuple(images.shape[:3])
    if not count:
        raise FrugalError(
            "the clip has no frames", "at least one", "choose another part of the clip"
        )
    scale = vae.spacial_compression_encode()
    rows, columns = height // scale, width // scale
    if not rows or not columns:
        raise FrugalError(
            f"the frames are {width} x {height}",
            f"at least {scale} x {scale}",
            "enlarge the frames",
        )
    half = encoder_of(vae, count, rows, columns)
    stream = VaeStream(vae, half, rows, columns, tile // scale, overlap // scale)
    stream.load()
    bar = comfy.utils.ProgressBar(half.cadence.used)
    frames = _frames_of(video) if images is None else iter(images)
    parts = []
    for call in half.cadence.calls:
        comfy.model_management.throw_exception_if_processing_interrupted()
        taken = [_next(frames, call.start, count) for _ in range(call.stop - call.start)]
        pixels = vae.vae_encode_crop_pixels(torch.stack(taken))
        piece = vae.process_input(pixels.movedim(-1, 0).unsqueeze(0)).to(vae.vae_dtype)
        made = stream.feed(piece, call)
        if made is not None:
            parts.append(made)
        bar.update_absolute(call.stop)
    samples = half.seen(torch.cat(parts, 2))
    lines = [
        f"encoded {half.cadence.used} frames {columns * scale} x {rows * scale} to "
        f"{samples.shape[2]} latents, in {len(half.cadence.calls)} chunks",
        f"ComfyUI's estimate for a chunk: {megabytes(half.memory)}; "
        f"state kept between chunks: {megabytes(stream.state_bytes())}",
        *(f"note: {note}" for note in _notes(stream, count, height, width)),
    ]
    return {"samples": samples}, "\n".join(lines)


def _notes(stream: VaeStream, count: int, height: int, width: int) -> list[str]:
    half, notes = stream.half, list(stream.notes)
    if count > half.cadence.used:
        left = count - half.cadence.used
        notes.append(f"the last {left} of {count} frames are left out: 1 + 4 k are taken")
    kept = stream.width * half.scale, stream.height * half.scale
    if kept != (width, height):
        notes.append(f"frames {width} x {height} are cropped at the centre")
    return notes + stream.seams("the first latent", "where latents are about 1")


def _of_file(video: Any) -> tuple[int, int, int]:
    """(frames, height, width), by reading the file through: headers may be wrong, and the last
    piece has to be known as the last.
    """
    count, height, width = 0, 0, 0
    for frame in reader.frames(*_part(video)):
        if not count:
            height, width, _ = reader.pixels(frame).shape
        count += 1
    return count, height, width


def _part(video: Any) -> tuple[Any, float, float]:
    """What to read: file, start and length in seconds; older ComfyUI cannot trim."""
    window = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
    return video.get_stream_source(), *window


def _frames_of(video: Any) -> Iterator[torch.Tensor]:
    return (torch.from_numpy(reader.pixels(frame)) for frame in reader.frames(*_part(video)))


def _next(frames: Iterator[torch.Tensor], start: int, count: int) -> torch.Tensor:
    frame = next(frames, None)
    if frame is None:
        raise FrugalError(
            f"the video ended near frame {start + 1}", f"{count} frames as before", "try again"
        )
    return frame
