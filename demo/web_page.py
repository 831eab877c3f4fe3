"""ComfyUI's web page in a headless Chromium, for pictures of nodes and for the browser tests.

Needs playwright from PyPI and a Chromium of the system's; FRUGAL_CHROMIUM names one that is not on
the search path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    # As root, without an accelerator, in a container with little shared memory.
    "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    # A page whose files are put in the place of the server's is no local one to Chromium.
    "--disable-features=LocalNetworkAccessChecks",
]  # fmt: skip
SETTINGS = {
    # Else a gallery covers the canvas of a first visitor, and old tabs come back.
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
}
VUE_NODES = "Comfy.VueNodes.Enabled"  # the page calls it Nodes 2.0
READY = """() => window.app?.extensionManager && app.graph
    && Object.keys(LiteGraph.registered_node_types).length > 50"""
READY_MS = 600_000  # a guard against a page that never comes, on a machine that others keep busy


def chromium() -> str:
    """Path of an installed Chromium or Chrome; empty when there is none."""
    named = os.environ.get("FRUGAL_CHROMIUM", "")
    return named or next(filter(None, map(shutil.which, NAMES)), "")


@contextmanager
def browser(executable: str) -> Iterator[Any]:
    """A headless browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


def open_page(page: Any, url: str, settings: dict[str, Any]) -> None:
    """Load the page of the server at `url`, with these of its settings, and wait for its nodes."""
    # Before the page opens, since it asks once.
    answer = page.request.post(f"{url}/api/settings", data={**SETTINGS, **settings})
    if not answer.ok:
        raise RuntimeError(f"{url} refused the settings: {answer.status} {answer.status_text}")
    page.goto(url)
    page.wait_for_function(READY, timeout=READY_MS)


def take_files(page: Any, url: str, static: Path) -> None:
    """Let a tab have the page's own files from the folder `static`, as from another version of
    comfyui-frontend-package, and everything else from the server at `url`.
    """

    def answer(route: Any) -> None:
        name = route.request.url.removeprefix(url).partition("?")[0].strip("/") or "index.html"
        if (static / name).is_file():
            route.fulfill(path=static / name)
        else:
            route.continue_()

    page.route(f"{url}/**", answer)
