"""ComfyUI's web page in a headless Chromium, used as a person would: drop a graph, look, run it.

FRUGAL_SCREENSHOTS names a folder for pictures of what was seen; without it none are kept.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from frugal.demo.web_page import VUE_NODES, open_page, take_files

SIZE = {"width": 1600, "height": 900}
# Limits for a machine that others keep busy; only a broken page waits that long.
WAIT_MS, RUN_MS = 300_000, 900_000

LISTEN = """() => {
    window.ended = [];
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, event => ended.push([kind, event.detail]));
}"""
DROP = """([name, text]) => {
    app.graph.extra.beforeTheDrop = true;
    const held = new DataTransfer();
    held.items.add(new File([text], name, {type: "application/json"}));
    for (const kind of ["dragenter", "dragover", "drop"])
        document.querySelector("#graph-canvas").dispatchEvent(new DragEvent(
            kind, {dataTransfer: held, bubbles: true, cancelable: true}));
}"""
DROPPED = "count => !app.graph.extra?.beforeTheDrop && app.graph.nodes.length === count"
NODES = """() => app.graph.nodes.map(node => ({
    id: node.id, type: node.type, title: node.title, pos: [...node.pos], size: [...node.size],
    known: node.type in LiteGraph.registered_node_types,
    pictures: (node.imgs ?? []).filter(img => img.naturalWidth > 0).map(img => img.src),
    saved: node.serialize().widgets_values ?? [],
    widgets: (node.widgets ?? []).map(widget => [widget.name, widget.value]),
}))"""
FIT = """margin => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map(each =>
        [each.pos[0], each.pos[1] - 40, each.pos[0] + each.size[0], each.pos[1] + each.size[1]]);
    const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])));
    const [right, bottom] = [2, 3].map(i => Math.max(...boxes.map(box => box[i])));
    const view = app.canvas.ds, page = app.canvas.canvas.getBoundingClientRect();
    view.scale = Math.min((page.width - 2 * margin) / (right - left),
        (page.height - 2 * margin) / (bottom - top), 1);
    view.offset = [margin / view.scale - left, margin / view.scale - top];
    app.canvas.setDirty(true, true);
}"""

# The classic canvas draws nodes itself, Nodes 2.0 as elements over it.
BOXES = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (element) {
        const box = element.getBoundingClientRect();
        return [node.id, [box.left, box.top, box.right, box.bottom]];
    }
    const [left, top, width, height] = node.getBounding();
    const view = app.canvas.ds, at = (x, y) =>
        [(x + view.offset[0]) * view.scale, (y + view.offset[1]) * view.scale];
    return [node.id, [...at(left, top), ...at(left + width, top + height)]];
}))"""
# Some frames in a row that draw nothing elsewhere: what lies over the canvas follows it.
REST = f"""async () => {{
    let before = "", same = 0;
    while (same < 5) {{
        await new Promise(requestAnimationFrame);
        const now = JSON.stringify(({BOXES})());
        same = now === before ? same + 1 : 0;
        before = now;
    }}
}}"""
NOTES = """() => app.graph.nodes.filter(node => node.type === "MarkdownNote")
    .map(node => [node.id, node.title])"""
# From afar the page draws a note without its text.
APPROACH = """id => {
    const node = app.graph.getNodeById(id), view = app.canvas.ds;
    view.scale = 1;
    view.offset = [100 - node.pos[0], 150 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""
NOTE_TEXT = """id => {
    const drawn = document.querySelector(`[data-node-id="${id}"]`);
    return drawn ?? app.graph.getNodeById(id).widgets[0].element;
}"""
NOTE_SHOWN = f"id => [...({NOTE_TEXT})(id).querySelectorAll('p')].some(p => p.clientHeight > 0)"
NOTE_CUT = f"""id => {{
    const text = ({NOTE_TEXT})(id);
    return [text, ...text.querySelectorAll("*")].some(part =>
        part.scrollHeight > part.clientHeight + 2
        && ["auto", "scroll", "hidden"].includes(getComputedStyle(part).overflowY));
}}"""
# The mask that blocks the page while a graph loads is looked through: in a page that draws nothing
# it may never have faded.
IN_VIEW = """text => {
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const start = walk.currentNode.data.indexOf(text);
        if (start < 0) continue;
        const range = document.createRange();
        range.setStart(walk.currentNode, start);
        range.setEnd(walk.currentNode, start + text.length);
        const box = range.getBoundingClientRect();
        const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
        const there = document.elementsFromPoint(x, y).find(
            each => !each.classList.contains("p-blockui-mask"));
        if (there && (there === walk.currentNode.parentElement
            || there.contains(walk.currentNode))) return true;
    }
    return false;
}"""


# What a person sees: words that are wide and high enough to be read.
REPORTS = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const element = node.widgets?.find(widget => widget.name === "frugal_report")?.element;
    const box = element?.getBoundingClientRect();
    return [node.type, box?.width > 50 && box.height > 20 ? element.innerText : ""];
}))"""
PLAYABLE = "() => [...document.querySelectorAll('video')].some(v => v.readyState >= 3)"


class Canvas:
    """One tab of the page at `url`; `open` before anything else. static: folder of the page's own
    files, in place of the server's.
    """

    def __init__(self, page: Any, url: str, static: Path | None = None):
        self.page, self.url = page, url
        page.set_default_timeout(WAIT_MS)
        if static is not None:
            take_files(page, url, static)

    def open(self, vue: bool = False, persist: bool = False) -> None:
        """Load the page; `vue`: draw nodes as its "Nodes 2.0" does; `persist`: with the workflow
        that was open before.
        """
        settings = {VUE_NODES: vue, "Comfy.Workflow.Persist": persist}
        open_page(self.page, self.url, settings)
        self.page.evaluate(LISTEN)

    def drop(self, path: Path) -> None:
        """Drop a saved graph on the canvas and wait until it is there."""
        text = path.read_text(encoding="utf-8")
        self.page.evaluate(DROP, [path.name, text])
        self.page.wait_for_function(DROPPED, arg=len(json.loads(text)["nodes"]))

    def nodes(self) -> dict[int, dict[str, Any]]:
        """What stands on the canvas, by node id: type, title, place, widgets, pictures shown."""
        return {int(node["id"]): node for node in self.page.evaluate(NODES)}

    def prompt(self) -> dict[str, Any]:
        """The graph as the page would queue it, without titles."""
        made = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return without_titles(made)

    def run(self) -> tuple[str, dict[str, Any]]:
        """Click Run and wait for the end: (execution_success or another event, its details)."""
        self.page.evaluate("() => { ended.length = 0; }")
        self.click("Run")
        self.page.wait_for_function("() => ended.length > 0", timeout=RUN_MS)
        kind, details = self.page.evaluate("() => ended[0]")
        return kind, details

    def boxes(self) -> dict[int, list[float]]:
        """Where nodes stand on the page, titles included: [left, top, right, bottom] in px."""
        return {int(key): box for key, box in self.page.evaluate(BOXES).items()}

    def cut_notes(self) -> list[str]:
        """Titles of the notes that need scrolling."""
        cut = []
        for number, title in self.page.evaluate(NOTES):
            self.page.evaluate(APPROACH, number)
            self.page.wait_for_function(NOTE_SHOWN, arg=number)
            if self.page.evaluate(NOTE_CUT, number):
                cut.append(title)
        return cut

    def click(self, name: str) -> None:
        """Click the first button of this name, through the element: animations can keep Playwright
        waiting for it to stand still.
        """
        button = self.page.get_by_role("button", name=name, exact=True).first
        button.evaluate("it => it.click()")

    def reports(self) -> dict[str, str]:
        """The text on each node that can be seen, by the node's type."""
        return self.page.evaluate(REPORTS)

    def await_player(self) -> None:
        """Wait for a video that is ready to play."""
        self.page.wait_for_function(PLAYABLE)

    def fetch(self, address: str) -> bytes:
        answer = self.page.request.get(address)
        assert answer.ok, answer.status_text
        return answer.body()

    def await_in_view(self, text: str) -> None:
        """Wait until these words can be read without scrolling; panels move in by and by."""
        end = time.monotonic() + WAIT_MS / 1000
        while not self.page.evaluate(IN_VIEW, text):
            assert time.monotonic() < end, f"never in view: {text}"
            self.page.wait_for_timeout(200)

    def await_count(self, locator: Any, count: int) -> None:
        """Wait until so many elements are there."""
        from playwright.sync_api import expect

        expect(locator).to_have_count(count, timeout=WAIT_MS)

    def shoot(self, name: str) -> None:
        """Keep a picture of the page."""
        if folder := os.environ.get("FRUGAL_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def fit(self, margin: int = 70) -> None:
        """Bring the whole graph into view."""
        self.page.evaluate(FIT, margin)
        self.page.evaluate(REST)


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    """An API graph without `_meta`: display names differ between versions and mean nothing."""
    return {
        key: {name: value for name, value in node.items() if name != "_meta"}
        for key, node in prompt.items()
    }
