"""A video made by a server: ordered, watched, put into the output folder, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch

from ...kernels.atomic_write import atomic_write
from ...kernels.errors import FrugalError
from ...kernels.video.reader import frames, pixels
from ...servers.address import server
from ...servers.dialects import DIALECTS, VideoRequest, checked
from ...servers.videos import RemoteVideo, order
from .._output import free_number
from . import glue

FOLDER = "frugal_videos"
# How much larger than the request a video may be, and pixels that any machine has room for.
MOST_TIMES, SMALL = 8, 2**26
AVI, WEBM = b"RIFF", b"\x1aE\xdf\xa3"


@dataclass(frozen=True)
class Received:
    """images float32 [frames, H, W, 3]; path: in the output folder; subfolder: of that folder."""

    images: torch.Tensor
    path: Path
    subfolder: str
    report: str


def make(
    request: VideoRequest,
    servers: str,
    dialect: str,
    key_variable: str,
    minutes: float,
    prefix: str,
) -> Received:
    """Raises FrugalError for a request that the server would change, and if no server makes it."""
    spoken = DIALECTS[dialect]
    request = checked(request, spoken)
    addresses = [server(line, key_variable) for line in servers.splitlines() if line.strip()]
    # The cancel button is asked for in between, so only the last value has to be there.
    bar, told = comfy.utils.ProgressBar(100), [0.0]
    folder = Path(folder_paths.get_user_directory()) / FOLDER
    work = order(
        addresses, spoken, request, folder, 60 * minutes, lambda share: told.__setitem__(0, share)
    )
    video = glue.wait_for(work, lambda: bar.update_absolute(int(told[0]), 100))
    path, subfolder = _written(video, prefix)
    images = _read(path, request)
    seen = f"{len(images)} frames of {images.shape[2]}x{images.shape[1]}"
    lines = [
        f"made by {video.server} ({dialect}) in {video.seconds:.1f} s: {seen}",
        f"job {video.job}, {len(video.data)} bytes, {path.name}",
        *(f"note: {note}" for note in (*video.notes, *_differences(images, request))),
    ]
    return Received(images, path, subfolder, "\n".join(lines))


def _written(video: RemoteVideo, prefix: str) -> tuple[Path, str]:
    folder, name, number, subfolder = free_number(prefix)
    suffix = ".avi" if video.data[:4] == AVI else ".webm" if video.data[:4] == WEBM else ".mp4"
    path = folder / f"{name}_{number:05}_{suffix}"
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(video.data)
    return path, subfolder


def _read(path: Path, request: VideoRequest) -> torch.Tensor:
    import av

    images = None
    count = 0
    try:
        for frame in frames(str(path)):
            _check_size(path, request, count + 1, frame.width * frame.height)
            picture = pixels(frame)
            if images is None:
                images = np.empty((request.frames, *picture.shape), np.float32)
            if count == len(images):
                images = np.concatenate([images, np.empty_like(images)])
            images[count] = picture
            count += 1
            comfy.model_management.throw_exception_if_processing_interrupted()
    except (av.error.FFmpegError, IndexError) as error:
        raise FrugalError(
            f"{path.name} cannot be read ({ascii(str(error))[1:-1][:100]})",
            "a video",
            "look into the server's log; the file is kept in the output folder",
        ) from None
    if images is None:
        raise FrugalError(f"{path.name} has no frames", "a video", "look into the server's log")
    return torch.from_numpy(images[:count])


def _check_size(path: Path, request: VideoRequest, frames: int, pixels: int) -> None:
    """A short file may hold a video that fills the memory."""
    wanted = request.frames * request.width * request.height
    if frames * pixels > max(MOST_TIMES * wanted, SMALL):
        raise FrugalError(
            f"{path.name} has {frames} or more frames of {pixels} pixels",
            f"at most {MOST_TIMES} times the {wanted} pixels asked for",
            "look at the file in the output folder, and correct the server",
        )


def _differences(images: torch.Tensor, request: VideoRequest) -> list[str]:
    found = []
    if len(images) != request.frames:
        found.append(f"{request.frames} frames were asked for")
    if (images.shape[2], images.shape[1]) != (request.width, request.height):
        found.append(f"{request.size} was asked for")
    return found
