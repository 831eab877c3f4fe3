"""Where a batch's finished pictures go: into a list, or one by one into a folder.

A folder is taken up again by a run with the same settings, which leaves out what is there; another
run gets a folder of its own. Files appear when they are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ...kernels.atomic_write import atomic_write
from ...kernels.errors import FrugalError
from .._output import free_number

UNFINISHED = "frugal/tryon_unfinished"
SETTINGS = "settings.json"
THUMB, SHEET_ROWS, LABEL = (96, 128), 24, 14  # px, rows per contact sheet, px of a label


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture [1, H, W, 3] in 8 bits; a level of 8 bits comes back as it was."""
    levels = (picture[0].float() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.cpu().numpy())


def write_png(picture: torch.Tensor, path: Path, info: PngInfo | None = None) -> None:
    """Write one picture as a PNG file that is whole or not there."""
    with atomic_write(path) as unfinished:
        to_image(picture).save(unfinished, "png", pnginfo=info, compress_level=4)


def graph_info(prompt: Any, extra: Mapping[str, Any] | None) -> PngInfo | None:
    """What ComfyUI's Save Image writes into a PNG, so that the page opens the graph from it."""
    if args.disable_metadata:
        return None
    info = PngInfo()
    for name, value in (("prompt", prompt), *(extra or {}).items()):
        if value is not None:
            info.add_text(name, json.dumps(value))
    return info


class InMemory:
    """All pictures in a list, for the nodes that follow."""

    def __init__(self) -> None:
        self.pictures: dict[int, torch.Tensor] = {}

    def has(self, number: int) -> bool:
        return False

    def add(self, number: int, picture: torch.Tensor) -> None:
        self.pictures[number] = picture

    def after_an_error(self) -> str:
        """Write the pictures as PNG into a folder of their own."""
        if not self.pictures:
            return "no picture was finished"
        folder, name, counter, subfolder = free_number(UNFINISHED)
        for number, picture in sorted(self.pictures.items()):
            write_png(picture, folder / f"{name}_{counter:05}_picture_{number + 1}.png")
        where = f"output/{subfolder}/{name}_{counter:05}_picture_*.png"
        return f"the {len(self.pictures)} finished pictures are in {where}"


class InFolder:
    """One PNG per picture, `names[number]`.png, and at the end contact sheets and a report.

    settings: whatever the pictures depend on. newer_than: time of the newest of a picture's own
    files; a picture older than that is made again.
    """

    def __init__(
        self,
        prefix: str,
        names: Sequence[str],
        settings: Any,
        info: PngInfo | None,
        newer_than: Sequence[float],
    ):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FrugalError(
                f"two pictures would be called {ascii(twice)[1:-1][:80]}.png",
                "a name of its own for each",
                "rename one of the files, or take the pair out of the list",
            )
        self.names, self.info = names, info
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.folder, self.shown = _folder_for(prefix, digest)
        self._there = {
            number
            for number, name in enumerate(names)
            if (path := self.folder / f"{name}.png").is_file()
            and path.stat().st_mtime >= newer_than[number]
        }

    def has(self, number: int) -> bool:
        return number in self._there

    def add(self, number: int, picture: torch.Tensor) -> None:
        write_png(picture, self.folder / f"{self.names[number]}.png", self.info)

    def after_an_error(self) -> str:
        return f"finished pictures are in {self.shown}; queue again to go on with the others"

    def close(self, report: str, grid: Sequence[Sequence[int]]) -> None:
        """Write report.txt and contact_sheet_N.jpg; `grid` has rows of picture numbers."""
        with atomic_write(self.folder / "report.txt") as unfinished:
            unfinished.write_text(report + "\n", encoding="utf-8")
        for start in range(0, len(grid), SHEET_ROWS):
            rows = [[self.names[n] for n in row] for row in grid[start : start + SHEET_ROWS]]
            path = self.folder / f"contact_sheet_{start // SHEET_ROWS + 1}.jpg"
            with atomic_write(path) as unfinished:
                _sheet(self.folder, rows).save(unfinished, "jpeg", quality=85)

    def sheets(self) -> dict[str, list[dict[str, str]]]:
        """The contact sheets as a `ui` value: the page shows them on the node."""
        found = sorted(self.folder.glob("contact_sheet_*.jpg"))
        inside = self.shown.removeprefix("output").lstrip("/")
        return {
            "images": [
                {"filename": path.name, "subfolder": inside, "type": "output"} for path in found
            ]
        }


def _folder_for(prefix: str, digest: str) -> tuple[Path, str]:
    """The folder of a run with these settings that was begun before, else the next free one."""
    parent, name, number, inside = free_number(prefix)
    place = f"output/{inside}" if inside else "output"
    for earlier in sorted(parent.glob(f"{name}_*_/{SETTINGS}"), reverse=True):
        try:
            if json.loads(earlier.read_text("utf-8"))["digest"] == digest:
                return earlier.parent, f"{place}/{earlier.parent.name}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    folder = parent / f"{name}_{number:05}_"
    os.makedirs(folder)
    with atomic_write(folder / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps({"digest": digest}), encoding="utf-8")
    return folder, f"{place}/{folder.name}"


def _sheet(folder: Path, rows: Sequence[Sequence[str]]) -> Image.Image:
    """The pictures in small, with their names; what is not there stays empty."""
    width, height = THUMB
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, name in enumerate(row):
            at = x * width, y * (height + LABEL)
            path = folder / f"{name}.png"
            if path.is_file():
                with Image.open(path) as picture:
                    picture.thumbnail(THUMB)
                    sheet.paste(picture, at)
            label = name.encode("ascii", "replace").decode()
            draw.text((at[0] + 1, at[1] + height), label[:15], fill="black")
    return sheet
