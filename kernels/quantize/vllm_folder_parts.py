"""What a diffusers folder of Wan holds beside its transformer: checked, and taken to another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import json_text
from ..errors import FrugalError

TRANSFORMER, MODEL = "transformer", "model_index.json"
# The pipelines of diffusers for a model, by whether it takes a start image.
PIPELINES = {False: "WanPipeline", True: "WanImageToVideoPipeline"}
# Files from this size on are linked; small ones are copied, since people edit settings.
LINKED = 1 << 20
REST = "a folder of the unquantised model as diffusers saves it"


def settings(rest: Path, image: bool) -> dict[str, Any]:
    """The transformer's configuration in the diffusers folder `rest` of a model that takes a start
    image or not. Raises FrugalError if the folder is of another kind of model, or not whole.
    """
    index = _read_json(rest / MODEL)
    pipeline = index.get("_class_name")
    if pipeline != PIPELINES[image]:
        raise FrugalError(
            f"{rest.name} is for {ascii(pipeline)[:60]}",
            f"{PIPELINES[image]}, as the model takes {'a' if image else 'no'} start image",
            f"name {REST}",
        )
    if _held(index, "transformer_2"):
        raise FrugalError(
            f"{rest.name} has two transformers, as Wan 2.2 14B has",
            "a model with one",
            "use AutoRound's own files for Wan 2.2",
        )
    missing = [name for name in _components(index) if not (rest / name).is_dir()]
    if missing:
        raise FrugalError(
            f"{rest.name} lacks the folder {missing[0]}", "all parts of the model", f"name {REST}"
        )
    return _read_json(rest / TRANSFORMER / "config.json")


def take_rest(rest: Path | None, target: Path) -> None:
    """Put everything of `rest` but its transformer into the folder `target`, and take away what an
    earlier try put there. Raises FrugalError if files cannot be read or have no room.
    """
    try:
        for old in target.iterdir():
            if old.name != TRANSFORMER:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        if rest is None:
            return
        index = _read_json(rest / MODEL)
        for name in _components(index):
            for place, _, files in os.walk(rest / name, followlinks=True):
                (target / Path(place).relative_to(rest)).mkdir(parents=True)
                for file in files:
                    path = Path(place) / file
                    _take(path.resolve(), target / path.relative_to(rest))
    except OSError as error:
        raise FrugalError(
            f"{rest.name if rest else target.name} cannot be copied ({error.strerror})",
            "readable files, and room for them",
            "mend that and run it again: what is done stays",
        ) from error
    # vLLM-Omni 0.30 takes the mere key for a second model, which then is not there.
    kept = {name: value for name, value in index.items() if name != "transformer_2"}
    write_json(target / MODEL, kept)


def _take(file: Path, target: Path) -> None:
    if file.stat().st_size >= LINKED:
        try:
            os.link(file, target)
            return
        except OSError:
            # Another disk, or one without links.
            pass
    shutil.copyfile(file, target)


def _components(index: Mapping[str, Any]) -> list[str]:
    """The folders of a model beside its transformer."""
    return [name for name in index if name != TRANSFORMER and _held(index, name)]


def _held(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    plain = name not in ("", ".", "..") and not set(name) & set("/\\:")
    return plain and isinstance(entry, list) and any(part is not None for part in entry)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json_text.parse(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FrugalError(
            f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__})",
            "a diffusers folder of the model",
            f"name {REST}",
        ) from error
    if not isinstance(found, dict):
        raise FrugalError(f"{path.name} is no JSON object", "settings", f"name {REST}")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write settings as diffusers lays them out."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
