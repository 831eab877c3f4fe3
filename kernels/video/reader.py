"""Frames out of a video file, one after the other, by PyAV (FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .writer import pyav

# Files that hold their own frames. FFmpeg also knows lists of other files (concat, hls, dash), with
# which a "video" would show any file of this machine.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,ogg,flv,asf,mxf,nut,ivf,dv,"
    "h264,hevc,m4v,mjpeg"
)


def frames(source: Any, start: float = 0.0, duration: float = 0.0) -> Iterator[Any]:
    """PyAV frames of the first video stream, in order of presentation.

    source: a path or a binary file object. start, duration: the part to read, in seconds; duration
    0 reads to the end. Raises FrugalError when PyAV is missing.
    """
    if hasattr(source, "seek"):
        source.seek(0)
    with pyav().open(source, options={"format_whitelist": CONTAINERS}) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if start:
            container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            # The seek goes to the key frame before.
            if frame.time is not None and frame.time < start:
                continue
            if duration and frame.time is not None and frame.time >= start + duration:
                return
            yield frame


def pixels(frame: Any) -> np.ndarray:
    """float32 [H, W, 3] RGB, 0 to 1, upright. 8-bit video is read as 8-bit RGB, deeper as 16."""
    if max(part.bits for part in frame.format.components) > 8:
        values = frame.to_ndarray(format="rgb48le") / np.float32(65535)
    else:
        values = frame.to_ndarray(format="rgb24") / np.float32(255)
    # Telephones store how they were held; older PyAV does not tell.
    turns = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(values, turns)) if turns else values
