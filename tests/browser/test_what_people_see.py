"""The page as a person meets it: Run and its picture, errors, missing files, templates, help."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.demo.graph_builder import Group, Node, build
from frugal.demo.layout import WORKFLOWS

EXPECTED = Path(__file__).parents[1] / "workflows" / "expected_tryon.png"
pytestmark = [pytest.mark.comfy, pytest.mark.browser]


def by_title(tab, title: str) -> dict:
    return next(node for node in tab.nodes().values() if node["title"] == title)


def test_a_wrong_file_says_which_to_take(tab, site, tmp_path):
    """The fix is on the screen after one click, without scrolling."""
    wrong = {"model_name": "frugal_demo_tryon_base.safetensors"}
    nodes = {
        "wan": Node("FrugalLoadWan", 0, wrong, size=(380, 220)),
        "report": Node("FrugalReport", 1, {}, {"model": ("wan", 0)}, size=(420, 300)),
    }
    path = tmp_path / "wrong_file.json"
    graph = build(site.object_info(fresh=True), nodes, [], [Group("Wrong file", 0, 1)])
    path.write_text(json.dumps(graph), encoding="utf-8")
    tab.drop(path)
    ended, details = tab.run()
    assert ended == "execution_error" and details["node_type"] == "FrugalLoadWan"
    assert details["exception_type"] == "frugal.FrugalError"
    tab.click("View details")
    tab.page.wait_for_function("() => document.body.innerText.includes('choose a Wan 2.1 file')")
    tab.shoot("wrong_file")
    tab.await_in_view("choose a Wan 2.1 file")


@pytest.mark.parametrize(("name", "count"), [("wan_i2v_14b_12gb", 4), ("tryon_to_video_12gb", 7)])
def test_missing_files_are_offered_for_download(tab, name, count):
    path = WORKFLOWS / f"{name}.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    wanted = {m["name"] for n in graph["nodes"] for m in n["properties"].get("models", [])}
    assert len(wanted) == count
    tab.drop(path)
    tab.click("View details")
    panel = tab.page.get_by_test_id("properties-panel")
    for file in sorted(wanted):
        panel.get_by_text(file, exact=True).first.wait_for()
    tab.shoot(f"missing_files-{name}")
    tab.await_count(panel.get_by_text("Download", exact=True), len(wanted))


def test_templates_show_our_cards(tab):
    names = {path.stem for path in WORKFLOWS.glob("*.json")}
    tab.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    tab.page.get_by_text("ComfyUI-Frugal", exact=True).first.wait_for()
    for name in sorted(names):
        card = tab.page.get_by_test_id(f"template-workflow-{name}")
        # Pictures are loaded as they come into view.
        card.first.evaluate("it => it.scrollIntoView()")
        picture = card.first.locator("img").first
        picture.evaluate("it => it.decode()")
        assert picture.evaluate("it => it.naturalWidth") >= 400, name
    tab.shoot("templates")
    tab.page.get_by_test_id("template-workflow-masks").first.evaluate("it => it.click()")
    tab.page.wait_for_function(
        "() => app.graph.nodes.some(node => node.type === 'FrugalMaskComposite')"
    )


@pytest.mark.parametrize("kind", ["FrugalLoadWan", "FrugalMemoryPlan", "FrugalTryOnStitch"])
def test_help_opens_in_the_info_tab(tab, kind):
    tab.page.keyboard.press("Escape")
    tab.page.evaluate(
        """kind => {
            for (const old of [...app.graph.nodes]) app.graph.remove(old);
            const node = LiteGraph.createNode(kind);
            app.graph.add(node);
            app.canvas.selectNode(node);
        }""",
        kind,
    )
    tab.page.get_by_test_id("panel-tab-info").evaluate("it => it.click()")
    panel = tab.page.get_by_test_id("properties-panel")
    panel.get_by_role("heading", name="When not to use it").wait_for()
    picture = panel.locator("img").first
    picture.evaluate("it => it.decode()")
    tab.shoot(f"help-{kind}")


def test_run_shows_the_dressed_figure_and_the_clip(tab):
    tab.drop(WORKFLOWS / "tryon_demo.json")
    tab.fit()
    ended, details = tab.run()
    assert ended == "execution_success", details
    tab.page.wait_for_function(
        "() => app.graph.nodes.find(n => n.title === 'Dressed photo').imgs?.[0]?.naturalWidth > 0"
    )
    tab.shoot("tryon_demo-ran")
    [source] = by_title(tab, "Dressed photo")["pictures"]
    shown = np.asarray(Image.open(io.BytesIO(tab.fetch(source))).convert("RGB")).astype(int)
    expected = np.asarray(Image.open(EXPECTED).convert("RGB")).astype(int)
    assert np.abs(shown - expected).max() <= 2
    tab.await_player()
