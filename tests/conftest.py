"""What every test gets: the pack as `frugal`, one ComfyUI to import from, one server on demand.

`FRUGAL_COMFYUI_TREE` names the ComfyUI folder; `none` means none, which is how the kernel tests
prove that kernels/ needs no ComfyUI; unset means the oldest tree in dev.py's cache folder.
`FRUGAL_CARD` names a mode of the simulated card, see tests/card/modes.py: ComfyUI then runs on it.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "comfyui-frugal"
NEEDS_COMFYUI = ("nodes", "workflows", "browser")


def register_pack() -> None:
    """Make the checkout importable as `frugal`, whatever its folder is called."""
    if "frugal" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "frugal", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["frugal"] = module
    spec.loader.exec_module(module)


def chosen_tree() -> Path | None:
    named = os.environ.get("FRUGAL_COMFYUI_TREE")
    if named == "none":
        return None
    if named:
        if not (Path(named) / "main.py").is_file():
            raise pytest.UsageError(f"FRUGAL_COMFYUI_TREE={named}: no main.py in that folder.")
        return Path(named)
    trees = [path.parent for path in CACHE.glob("*/main.py")]
    return min(trees, key=_version, default=None)


def _version(tree: Path) -> list[int]:
    return [int(part) for part in tree.name.rpartition("-")[2].split(".") if part.isdigit()]


def enter_tree(tree: Path) -> None:
    """Put ComfyUI on the import path, in CPU mode or on the simulated card, with a throw-away base
    directory.

    ComfyUI reads its options at the first import, so this has to come before any of its modules.
    """
    # One test process, one ComfyUI: `nodes`, `utils` and others are top-level names there.
    sys.path.insert(0, str(tree))
    base = tempfile.mkdtemp(prefix="frugal-base-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = base
    if CARD:
        modes.settle(comfy.cli_args.args)
        modes.entered()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounding-by-shape",
        type=int,
        metavar="SEED",
        help="products of other shapes round otherwise; see tests/helpers/rounding_by_shape.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (seed := config.getoption("--rounding-by-shape")) is not None:
        # Servers that tests start read it too.
        os.environ["FRUGAL_ROUNDING_BY_SHAPE"] = str(seed)
        importlib.import_module("frugal.tests.helpers.rounding_by_shape")


register_pack()
TREE = chosen_tree()
CARD = bool(os.environ.get("FRUGAL_CARD")) and TREE is not None
if CARD:
    from frugal.tests.card import modes

    modes.prepare()
if TREE is not None:
    enter_tree(TREE)
collect_ignore = [] if TREE else list(NEEDS_COMFYUI)
if not CARD:
    collect_ignore.append("card")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the simulated card: its own tests, and those marked for it. Kernels that round by shape
    copy what they are given, so that memory is counted without them alone.
    """
    if config.getoption("--rounding-by-shape") is not None:
        copies = pytest.mark.skip(reason="kernels that round by shape take memory of their own")
        for item in items:
            if item.get_closest_marker("counts_memory"):
                item.add_marker(copies)
    if CARD:
        own = ROOT / "tests" / "card"
        left = [i for i in items if own not in i.path.parents and not i.get_closest_marker("card")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def pytest_report_header(config: pytest.Config) -> str:
    if TREE is None:
        return f"ComfyUI: none, so these folders are left out: {', '.join(collect_ignore)}"
    return f"ComfyUI: {TREE}"


@pytest.fixture(scope="session")
def comfy_tree() -> Path:
    """The ComfyUI folder under test."""
    if TREE is None:
        pytest.skip("no ComfyUI folder: run `python dev.py test`, or set FRUGAL_COMFYUI_TREE")
    return TREE


@pytest.fixture(scope="session")
def sockets(tmp_path_factory: pytest.TempPathFactory):
    """The socket calls of the shared server from its start on."""
    from frugal.tests.helpers.sockets import SocketLog

    return SocketLog(tmp_path_factory.mktemp("sockets"))


@pytest.fixture(scope="session")
def server(comfy_tree: Path, sockets, tmp_path_factory: pytest.TempPathFactory):
    """One real ComfyUI server with the pack and helpers/extra_nodes.py for the whole run,
    with its web page where that is installed; see demo/comfy_server.py.
    """
    from frugal.demo.comfy_server import ComfyServer

    base = tmp_path_factory.mktemp("comfy")
    if CARD:
        from frugal.tests.card.server import CardServer

        running = CardServer(comfy_tree, base)
    else:
        page = importlib.util.find_spec("comfyui_frontend_package") is not None
        running = ComfyServer(comfy_tree, base, frontend=page)
    (running.base / "custom_nodes").mkdir()
    for name in ("helpers/extra_nodes.py", "helpers/rounding_by_shape.py"):
        shutil.copy(ROOT / "tests" / name, running.base / "custom_nodes")
    with sockets.watching():
        running.start()
    yield running
    running.stop()
