"""What the nodes share that write video files into the output folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy.cli_args import args
from comfy_api.v0_0_2 import InputImpl, io, ui

from ...kernels.video.writer import FORMATS, QUALITIES
from .._output import prefix_problem


def file_inputs() -> list:
    """Name, format and quality of a video file."""
    return [
        io.String.Input(
            "filename_prefix",
            default="video/wan",
            tooltip=(
                "Folder and start of the file name inside output; a number is added. "
                "%width%, %height%, %year%, %month%, %day% are filled in."
            ),
        ),
        io.Float.Input(
            "fps",
            default=16.0,
            min=1.0,
            max=240.0,
            step=0.01,
            tooltip="Frames per second of the file. Wan 2.1: 16. Wan 2.2 5B: 24.",
        ),
        io.Combo.Input(
            "format",
            options=list(FORMATS),
            tooltip="H.264 plays everywhere; AV1 and VP9 give smaller files and take longer.",
        ),
        io.Combo.Input(
            "quality",
            options=list(QUALITIES),
            default="good",
            tooltip=(
                "Constant quality of the file. crf for high/good/small: H.264 17/21/27, AV1 "
                "23/30/38, VP9 24/31/38."
            ),
        ),
    ]


def prefix_checked(cls, filename_prefix=None):
    """`validate_inputs` of a node with `file_inputs`: a name that cannot be is refused before
    anything is sampled.
    """
    return prefix_problem("", filename_prefix)


def video_output():
    """The files as VIDEO."""
    return io.Video.Output(
        "video",
        display_name="video",
        is_output_list=True,
        tooltip="The file, one per clip of the batch.",
    )


def metadata(hidden: Any) -> dict[str, str]:
    """The graph, as ComfyUI's own 'Save Video' writes it."""
    if args.disable_metadata:
        return {}
    found = {**(hidden.extra_pnginfo or {}), "prompt": hidden.prompt}
    return {name: json.dumps(value) for name, value in found.items() if value is not None}


def shown_videos(paths: Sequence[Path], subfolder: str) -> tuple[list[Any], ui.PreviewVideo]:
    """(VIDEO of each file, what shows them on the node)."""
    shown = [ui.SavedResult(path.name, subfolder, io.FolderType.output) for path in paths]
    videos = [InputImpl.VideoFromFile(str(path)) for path in paths]
    return videos, ui.PreviewVideo(shown)
