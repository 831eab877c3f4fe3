"""Take the pictures of the help pages: each node as ComfyUI's own web page draws it.

    python -m demo.node_pictures --tree DIR [--frontend DIR] [--all] [--only NodeId ...]

Draws the pictures that are missing or do not show their node as it is now.

Needs `pip install playwright` and a Chromium (`--browser`). `--frontend` names the `static` folder
of comfyui-frontend-package where it is not installed. Lists of model files are empty here, so that
the pictures do not depend on whose machine it was; "(your file)" stands in them. Each picture has
what it shows in it as text, so that a test finds the one that its node has left behind.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .comfy_server import ComfyServer, pack_node_ids
from .layout import DEMO
from .web_page import VUE_NODES, browser, chromium, open_page

HELP = DEMO.parent / "nodes" / "web" / "docs"
# Fewer lose the colours of the slots, which are a handful of pixels.
COLORS = 255
VIEW = {"width": 1500, "height": 1400}
MARGIN = 12
SETTINGS = {
    VUE_NODES: False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
}
# Far from the page's own bars, whole pixels, no zoom: letters stay sharp. The graph is not cleared:
# that restarts node numbers, and the page gives a number's old widget values to the next node.
PLACE = """async ([id, x, y]) => {
    for (const old of [...app.graph.nodes]) app.graph.remove(old);
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    for (const widget of node.widgets ?? [])
        if (widget.type === "combo" && widget.value === undefined) widget.value = "(your file)";
    const needed = node.computeSize();
    node.size = [Math.max(needed[0], 300, node.title.length * 8.5 + 50), needed[1]];
    node.pos = [0, 0];
    app.canvas.deselectAll?.();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [x, y];
    app.canvas.setDirty(true, true);
    for (let n = 0; n < 5; n++) await new Promise(requestAnimationFrame);
    const area = document.querySelector("#graph-canvas").getBoundingClientRect();
    const box = node.boundingRect ?? node.getBounding();
    return [area.x + x + box[0], area.y + y + box[1], box[2], box[3]];
}"""


SHOWS = "Shows"  # the keyword of the text in the file


def shows(info: dict[str, Any]) -> str:
    """What a picture of the node shows: title, inputs with their defaults, outputs; `info` as in
    /object_info.
    """
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    defaults = {
        name: (rest[0] if rest else {}).get("default") for name, (_, *rest) in given.items()
    }
    return json.dumps([info["display_name"], defaults, list(info["output_name"])])


def shown(node_id: str) -> str | None:
    """What the picture of this node says that it shows; None if there is no such picture."""
    path = HELP / f"{node_id}.png"
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.text.get(SHOWS)  # type: ignore[attr-defined]


def take(page: Any, node_id: str) -> Image.Image:
    """One node by itself, with a margin."""
    x, y, width, height = page.evaluate(PLACE, [node_id, 400, 150])
    clip = {
        "x": x - MARGIN,
        "y": y - MARGIN,
        "width": width + 2 * MARGIN,
        "height": height + 2 * MARGIN,
    }
    if clip["y"] + clip["height"] > VIEW["height"]:
        raise SystemExit(f"{node_id} is {height:.0f} px high; make VIEW higher than that.")
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    return picture.quantize(COLORS, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", required=True, help="ComfyUI folder")
    parser.add_argument("--frontend", help="folder of the web page, if it is not installed")
    parser.add_argument("--browser", default=chromium(), help="Chromium's program")
    parser.add_argument("--all", action="store_true", help="draw every picture again")
    parser.add_argument("--only", nargs="*", help="draw these node ids again")
    options = parser.parse_args()
    if not options.browser:
        raise SystemExit("Name a Chromium with --browser: none is called 'chromium' here.")
    more = ("--front-end-root", str(Path(options.frontend).resolve())) if options.frontend else ()
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(options.tree, base, arguments=more, frontend=True) as server,
        browser(options.browser) as running,
    ):
        page = running.new_page(viewport=VIEW)
        open_page(page, server.url, SETTINGS)
        page.wait_for_timeout(2000)
        info = server.object_info()
        now = {each: shows(info[each]) for each in pack_node_ids()}
        stale = [each for each in now if options.all or shown(each) != now[each]]
        for node_id in sorted(options.only or stale):
            picture, text = take(page, node_id), PngInfo()
            text.add_text(SHOWS, now[node_id])
            picture.save(HELP / f"{node_id}.png", optimize=True, pnginfo=text)
            print(f"{node_id}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
