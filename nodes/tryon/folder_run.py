"""Persons, garments, masks and pairs from folders; each file is read when its turn comes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ...kernels.errors import FrugalError
from ...kernels.tryon import batching
from . import picture_files
from .batch_run import Scene, Source

ERASED = "erased parts of the photos"
NO_LIST = "(none)"


@dataclass
class Shop:
    """What a run over folders makes. dates: time of the newest file of each picture. rows: numbers
    of the pictures of each person. strays: lines of the list that name nothing.
    """

    persons: list[Source]
    garments: list[Source]
    scenes: list[Scene]
    dates: list[float] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [
            f"{self.persons[s.person].name}__{self.garments[s.garment].name}" for s in self.scenes
        ]

    @property
    def rows(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for number, scene in enumerate(self.scenes):
            found.setdefault(scene.person, []).append(number)
        return list(found.values())


def lists() -> list[str]:
    """CSV files in ComfyUI's input folder, to choose from."""
    root = Path(folder_paths.get_input_directory())
    found = sorted(p.name for p in root.glob("*.csv")) if root.is_dir() else []
    return [NO_LIST, *found]


def open_shop(
    persons: str,
    garments: str,
    masks: str,
    combine: str,
    pairs_file: str,
    size: tuple[int, int],
    subfolders: bool,
) -> Shop:
    """See the inputs of *Try-On Folder*; size (H, W) of the canvas. Raises FrugalError where there
    is nothing to do.
    """
    people = picture_files.named_pictures(persons, subfolders)
    clothes = picture_files.named_pictures(garments, subfolders)
    painted = {} if masks == ERASED else picture_files.named_pictures(masks, subfolders)
    by_name = {name.casefold(): path for name, path in painted.items()}

    def person(name: str, path: Path) -> Source:
        mask = None if masks == ERASED else by_name.get(name.casefold())
        return Source(name, lambda: _person(name, path, mask, masks))

    shop = Shop(
        [person(name, path) for name, path in people.items()],
        [Source(name, lambda path=path: _garment(path)) for name, path in clothes.items()],
        [],
    )
    if pairs_file == NO_LIST:
        pairs = batching.jobs(len(people), len(clothes), combine)
    else:
        pairs, shop.strays = _listed(pairs_file, list(people), list(clothes))
    shop.scenes = [Scene(p, g, size) for p, g in pairs]
    photos, worn = list(people.items()), list(clothes.values())
    for p, g in pairs:
        name, photo = photos[p]
        files = [photo, worn[g], by_name.get(name.casefold())]
        shop.dates.append(max(file.stat().st_mtime for file in files if file is not None))
    return shop


def _person(
    name: str, path: Path, mask: Path | None, masks: str
) -> tuple[torch.Tensor, torch.Tensor]:
    colour, alpha = picture_files.read_picture(path)
    if masks == ERASED:
        if alpha is None:
            raise FrugalError(
                f"{path.name} has no transparent part",
                "a photo whose clothes are erased, as the MaskEditor saves it",
                "paint it in the MaskEditor, or choose a folder of masks",
            )
        return colour, 1 - alpha
    if mask is None:
        raise FrugalError(
            f"there is no mask for {path.name}",
            f"a picture called {name} in input/{masks}, white where to repaint",
            "add it",
        )
    return picture_files.on_white(colour, alpha), picture_files.as_mask(
        *picture_files.read_picture(mask)
    )


def _garment(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    colour, alpha = picture_files.read_picture(path)
    return colour, None if alpha is None else 1 - alpha


def _listed(
    file: str, persons: Sequence[str], garments: Sequence[str]
) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of a CSV file: one person and one garment per line, with or without the file's ending;
    a first line that names neither is a heading. Lines that name nothing come back as sentences.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / file).resolve()
    if root not in path.parents or not path.is_file():
        raise FrugalError(f"there is no list input/{file}", "a CSV file", "choose another list")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        text = stream.read()
    comma = ";" if text.partition("\n")[0].count(";") else ","
    lines = [
        [cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=comma)
    ]
    known = [_numbers(names) for names in (persons, garments)]
    pairs, strays = [], []
    for number, row in enumerate(lines, start=1):
        if not any(row):
            continue
        found = [where.get(_key(cell)) for where, cell in zip(known, [*row, ""], strict=False)]
        if None not in found and len(row) >= 2:
            pairs.append((found[0], found[1]))
        elif number > 1 or any(each is not None for each in found):
            what = ", ".join(ascii(cell)[1:-1][:40] for cell in row[:2])
            strays.append(f"line {number} of {file}: no such person or garment: {what}")
    if not pairs:
        raise FrugalError(
            f"no line of input/{file} names a person and a garment of the folders",
            "lines such as: anna.jpg,coat.png",
            "correct the list",
        )
    return list(dict.fromkeys(pairs)), strays


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {_key(name): number for number, name in enumerate(names)}


def _key(name: str) -> str:
    path = Path(name.replace("\\", "/"))
    plain = path.with_suffix("") if path.suffix.lower() in picture_files.SUFFIXES else path
    return plain.as_posix().replace("/", "-").casefold()


def ancestors(prompt: Mapping[str, Any] | None, node: str, without: Sequence[str]) -> Any:
    """What the result of `node` in an API graph depends on: its own inputs and all nodes before it;
    `without`: inputs of its own that change how it works and not what it gives.
    """
    found: dict[str, Any] = {}

    def visit(key: str, left_out: Sequence[str] = ()) -> None:
        if prompt is None or key in found or key not in prompt:
            return
        entry = prompt[key]
        given = {k: v for k, v in entry["inputs"].items() if k not in left_out}
        found[key] = [entry["class_type"], given]
        for value in given.values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                visit(value[0])

    visit(node, without)
    return found
