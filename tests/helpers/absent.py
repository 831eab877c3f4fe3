"""A Python in which packages seem not to be installed: for one process, by `sitecustomize`.

`environment(...)` goes into the process's environment. Two kinds: `absent` is found by nobody;
`hidden` is found by everything but the modules below a folder, for packages that ComfyUI itself
cannot start without.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

# Every virtual environment has them, so nothing is gained by a Python without.
ALWAYS = {"pip", "setuptools", "wheel"}

CODE = """
import builtins, importlib.machinery, importlib.util, os, sys

absent = set(filter(None, os.environ["FRUGAL_TEST_ABSENT"].split(",")))
hidden = set(filter(None, os.environ["FRUGAL_TEST_HIDDEN"].split(",")))
folder = os.environ["FRUGAL_TEST_HIDDEN_BELOW"]


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder


def below(space):
    return os.path.abspath(str((space or {}).get("__file__", ""))).startswith(folder)


def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    if level == 0 and top in hidden and below(globals):
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    return real_import(name, globals, locals, fromlist, level)


def guarded_find(name, package=None):
    if name.partition(".")[0] in hidden and below(sys._getframe(1).f_globals):
        return None
    return real_find(name, package)


real_import, builtins.__import__ = builtins.__import__, guarded_import
real_find, importlib.util.find_spec = importlib.util.find_spec, guarded_find
"""


def environment(
    place: Path, absent: Iterable[str], hidden: Iterable[str] = (), below: Path | None = None
) -> dict[str, str]:
    """Variables for a child process; writes what it starts with into the folder `place`."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "sitecustomize.py").write_text(CODE, encoding="utf-8")
    earlier = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(place), earlier])),
        "FRUGAL_TEST_ABSENT": ",".join(absent),
        "FRUGAL_TEST_HIDDEN": ",".join(hidden),
        "FRUGAL_TEST_HIDDEN_BELOW": str(below or place),
    }


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(path: Path) -> list[Requirement]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Requirement(line.partition(" #")[0].strip()))
        except InvalidRequirement:
            assert not line.strip() or line.lstrip().startswith("#"), f"{path}: {line!r}"
    return found


def closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the installed distributions that the requirements pull in."""
    todo, found = list(wanted), set()
    seen: set[str] = set()
    while todo:
        one = todo.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        try:
            parts = importlib.metadata.requires(one.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(plain(one.name))
        extras = ["", *one.extras]
        for part in map(Requirement, parts):
            if not part.marker or any(part.marker.evaluate({"extra": e}) for e in extras):
                todo.append(part)
    return found


def modules_outside(distributions: set[str]) -> set[str]:
    """Top-level modules of everything installed that is not one of these distributions."""
    kept = distributions | ALWAYS
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {plain(owner) for owner in owners}
    }
