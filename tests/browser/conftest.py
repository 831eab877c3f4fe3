"""What browser tests share: the server with the demo's files in place, one browser, one tab."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from frugal.demo import batch_graph, mask_graph, web_page
from frugal.demo import run as demo
from frugal.demo.layout import MODELS
from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers import canvas

MODES = {"classic": False, "nodes2": True}
PAGE = "comfyui_frontend_package"
# Made by dev.py: the newest version of the page, beside the installed one.
NEWEST = Path(sys.prefix) / "newest-page"


# Not for the whole run: while it is there no other test may start an event loop.
@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright", reason="no playwright; tests/requirements.txt lists it")
    found = web_page.chromium()
    if not found:
        pytest.skip("no Chromium: 'apt-get install chromium', or name one in FRUGAL_CHROMIUM")
    with web_page.browser(found) as running:
        yield running


@pytest.fixture(scope="session")
def site(server):
    """The shared server with the demo's models and pictures where its graphs look for them."""
    pytest.importorskip(PAGE, reason="no web page; tests/requirements.txt lists it")
    shutil.copytree(MODELS, server.models, dirs_exist_ok=True)
    build_demo_wan(server.models)
    pictures = server.base / "input"
    for name, pixels in zip(demo.INPUTS, demo.swap(demo.SHOWN), strict=False):
        Image.fromarray(pixels).save(pictures / name)
    mask_graph.write_inputs(pictures)
    batch_graph.draw_into(pictures)
    return server


@pytest.fixture(scope="module")
def tab(chromium, site, request):
    """A fresh tab; drawn by Nodes 2.0 where a test asks for `nodes2`."""
    seen = canvas.Canvas(chromium.new_page(viewport=canvas.SIZE), site.url)
    seen.open(MODES[getattr(request, "param", "classic")])
    yield seen
    seen.page.close()


def static_files(version: str, tree: Path) -> Path:
    """The page's own files: of the `installed` version, or of the `newest`, which only the ComfyUI
    gets that asks for the installed one.
    """
    wanted = re.search(r"comfyui-frontend-package==(\S+)", (tree / "requirements.txt").read_text())
    if version == "installed":
        [found] = importlib.util.find_spec(PAGE).submodule_search_locations
        return Path(found) / "static"
    if wanted and wanted[1] != importlib.metadata.version(PAGE):
        pytest.skip("an older ComfyUI, which people have with an older page")
    if not (NEWEST / PAGE / "static").is_dir():
        pytest.skip("no newest web page; 'python dev.py test' fetches it")
    return NEWEST / PAGE / "static"
