"""Who may import whom: three parts in one direction, and no cycles of files or packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from frugal.tests.test_house import COMFYUI_MODULES, sources

ROOT = Path(__file__).resolve().parent.parent
TENSORS = {"torch", "numpy", "numba", "safetensors", "av", "PIL"}
NETWORK = {"aiohttp", "http", "ray", "requests", "socket", "sqlite3", "starlette", "urllib"}
# Part -> what it must not import, and which parts of the pack it may.
PARTS = {
    "kernels": (COMFYUI_MODULES | NETWORK, {"kernels"}),
    "servers": (COMFYUI_MODULES | TENSORS, {"servers", "kernels"}),
    "nodes": (set(), {"nodes", "kernels", "servers"}),
}
# What servers/ uses of kernels/: no tensors.
SHARED = {"atomic_write", "errors", "json_text", "log", "report"}


def module(path: Path) -> tuple[str, ...]:
    """Parts of the dotted name; a package is its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module(path): path for path in sources(*PARTS)}


def imports(path: Path, nested: bool) -> Iterator[tuple[str, ...]]:
    """Every imported module: of the pack by its parts, of others by its first name.

    nested: also what is imported inside functions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The package is the folder, also for __init__.py; two command lines are packages of their own.
    package = path.relative_to(ROOT).parent.parts
    package = package[:1] if package[-1].endswith("_cli") else package
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0],) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield ((node.module or "").split(".")[0],)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level]
            base += tuple(node.module.split(".")) if node.module else ()
            # `from . import name` is a module of that package where there is one.
            yield from ((*base, a.name) if (*base, a.name) in MODULES else base for a in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_parts_import_in_one_direction(part):
    never, allowed = PARTS[part]
    for path in sources(part):
        for found in imports(path, nested=True):
            where = f"{path.relative_to(ROOT)} imports {'.'.join(found)}"
            assert found[0] not in never, where
            if found in MODULES:
                assert found[0] in allowed, where
                if part == "servers" and found[0] == "kernels":
                    assert found[1] in SHARED, where


def cycle(graph: dict) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [".".join(each) for each in error.args[1]]
    return []


def test_no_cycles_of_files():
    graph = {
        name: {found for found in imports(path, nested=False) if found in MODULES} - {name}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 500, "the imports were not found"
    assert cycle(graph) == []


def test_no_cycles_of_packages():
    graph: dict = {}
    for path in MODULES.values():
        package = path.relative_to(ROOT).parent.parts
        for found in imports(path, nested=False):
            if found in MODULES:
                target = MODULES[found].relative_to(ROOT).parent.parts
                # A part's own folder holds what all its packages share.
                if target != package and len(target) > 1 and len(package) > 1:
                    graph.setdefault(package, set()).add(target)
    assert len(graph) > 15, "the imports were not found"
    assert cycle(graph) == []


def test_a_cycle_is_found():
    assert cycle({("a",): {("b",)}, ("b",): {("a",)}}) in (["a", "b", "a"], ["b", "a", "b"])
