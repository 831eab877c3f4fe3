"""After the job has ended, after a fresh page and after a second run: reports can be read, the
video can be played. On both versions of the page, drawn both ways.
"""

from __future__ import annotations

import json

import pytest

from frugal.demo.graph_builder import Group, Node, build
from frugal.tests.browser.conftest import static_files
from frugal.tests.helpers import canvas

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
VAE = "wan_tiny_random_vae.safetensors"
REPORTING = {"FrugalDoctor", "FrugalWanDecodeToFile", "FrugalReport"}
# Long enough for what the page still clears after a job, and for a preview under way.
SETTLED_MS = 1000


def graph(info: dict) -> dict:
    nodes = {
        "vae": Node("VAELoader", 0, {"vae_name": VAE}),
        "latent": Node("EmptyHunyuanLatentVideo", 0, {"width": 64, "height": 64, "length": 9}),
        "doctor": Node("FrugalDoctor", 0, {}, size=(420, 200)),
        "decode": Node(
            "FrugalWanDecodeToFile", 1, {}, {"samples": ("latent", 0), "vae": ("vae", 0)},
            size=(420, 760),
        ),
        "report": Node("FrugalReport", 2, {}, size=(420, 320)),
    }  # fmt: skip
    return build(info, nodes, [], [Group("What stays", 0, 2)])


def run_and_check(tab: canvas.Canvas, frames: int, name: str) -> None:
    """One run of a clip of `frames`: what is told of it, and its video, are there to the end."""
    tab.page.evaluate(
        """frames => {
            const node = app.graph.nodes.find(each => each.type === "EmptyHunyuanLatentVideo");
            node.widgets.find(each => each.name === "length").value = frames;
        }""",
        frames,
    )
    ended, details = tab.run()
    assert ended == "execution_success", details
    tab.page.wait_for_timeout(SETTLED_MS)
    tab.await_player()
    told = tab.reports()
    tab.shoot(name)
    assert {kind for kind, text in told.items() if text} == REPORTING
    assert f"{frames} frames" in told["FrugalWanDecodeToFile"]
    # What was meant for Markdown loses its lines; at most six are shown.
    assert 2 <= len(told["FrugalDoctor"].splitlines()) <= 6


@pytest.mark.parametrize("version", ["installed", "newest"])
def test_reports_and_the_video_stay(chromium, site, comfy_tree, tmp_path, version):
    page = chromium.new_page(viewport=canvas.SIZE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    tab = canvas.Canvas(page, site.url, static_files(version, comfy_tree))
    tab.open(vue=False, persist=True)
    path = tmp_path / "what_stays.json"
    path.write_text(json.dumps(graph(site.object_info(fresh=True))), encoding="utf-8")
    tab.drop(path)
    tab.fit()
    run_and_check(tab, 9, f"stays-{version}-classic-first")
    run_and_check(tab, 13, f"stays-{version}-classic-second")
    before = tab.reports()
    tab.open(vue=True, persist=True)
    page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'FrugalDoctor')")
    tab.fit()
    page.wait_for_function("() => document.querySelectorAll('.frugal-report').length === 3")
    assert tab.reports() == before
    run_and_check(tab, 17, f"stays-{version}-nodes2-first")
    run_and_check(tab, 21, f"stays-{version}-nodes2-second")
    assert errors == []
    page.close()
