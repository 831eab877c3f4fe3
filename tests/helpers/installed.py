"""The pack as an installed one: packages under the names that pyproject.toml gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def installed(folder: Path) -> Path:
    """A folder to import from, with the packages where pyproject.toml puts them."""
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    settings = tomllib.loads(text)["tool"]["setuptools"]
    places = settings["package-dir"]
    for package in settings["packages"]:
        whole, rest = package, ""
        while whole not in places:
            whole, _, last = whole.rpartition(".")
            rest = f"{last}/{rest}"
        place = folder / package.replace(".", "/")
        place.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / places[whole] / rest).glob("*.py"):
            (place / file.name).symlink_to(file)
    return folder
