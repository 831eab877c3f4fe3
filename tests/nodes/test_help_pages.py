"""What a person reads beside a node: its help page, tooltips and the words it is found by.

Read from the live schemas, so an input that was added and not explained fails here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from frugal.demo.node_pictures import shown, shows
from frugal.nodes import FAMILIES

PAGES = Path(__file__).resolve().parents[2] / "nodes" / "web" / "docs"
SECTIONS = ("Inputs", "Outputs", "Cost", "When not to use it")
# Words that a hurried reader meets before the details begin; a page of more than LONG words says
# above them when to use the node, and which three settings matter.
FOLD, LONG, SHORT = 300, 600, "In short"
MOST_COLUMNS = 4
LARGEST_PICTURE = 30_000
LARGEST_SUM = 1_500_000


@pytest.fixture(scope="module")
def nodes(comfy_tree) -> list:
    families = [importlib.import_module(f"frugal.nodes.{name}.nodes") for name in FAMILIES]
    return [node for family in families for node in family.NODES]


@pytest.fixture(scope="module")
def schemas(nodes) -> list:
    return [node.GET_SCHEMA() for node in nodes]


def sections(page: str) -> dict[str, str]:
    """Heading -> text below it; the text above the first heading stands under ''."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    titles, texts = parts[1::2], parts[2::2]
    below = {title: text.strip() for title, text in zip(titles, texts, strict=True)}
    return {"": parts[0]} | below


def names(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def faults(schema, page: str) -> list[str]:
    """What the page of this node leaves out."""
    found = sections(page)
    if not page.startswith(f"# {schema.display_name}\n"):
        found_title = page.partition("\n")[0]
        return [f"the title is {found_title!r}, the node is called {schema.display_name!r}"]
    missing = [f"no section {title!r}" for title in SECTIONS if not found.get(title)]
    if f"![The node]({schema.node_id}.png)" not in found[""]:
        missing.append("no picture of the node above the first heading")
    missing += [f"input {i.id} is not named" for i in schema.inputs if not names(i.id, page)]
    for output in schema.outputs:
        # What the node shows is the display name; the id is what a workflow file holds.
        shown = (output.id, output.display_name or output.id)
        if not any(names(word, found.get("Outputs", "")) for word in shown):
            missing.append(f"output {shown[-1]} is not named under Outputs")
    first = next(iter([title for title in found if title]), "")
    above = found[""] + (found[first] if first == SHORT else "")
    if len(above.split()) > FOLD:
        missing.append(f"{len(above.split())} words before the details begin")
    if len(page.split()) > LONG and first != SHORT:
        missing.append(f"no section {SHORT!r} at the top of {len(page.split())} words")
    if first == SHORT and len(re.findall(r"^- ", found[SHORT], flags=re.MULTILINE)) != 3:
        missing.append(f"{SHORT!r} does not name three settings")
    if any(
        row.count("|") > MOST_COLUMNS + 1 for row in re.findall(r"^\|.*\|$", page, re.MULTILINE)
    ):
        missing.append("a table that is wider than the panel")
    if re.search(r"^\| (input|output) \|[^|]*\|.*\|", page, flags=re.MULTILINE):
        # The panel is 260 px wide: a third column is cut off.
        missing.append("a table of inputs or outputs with three columns")
    return missing


def test_every_page_is_complete(schemas):
    found = {}
    for schema in schemas:
        page = (PAGES / f"{schema.node_id}.md").read_text("utf-8")
        if missing := faults(schema, page):
            found[schema.node_id] = missing
    assert not found


def test_what_is_left_out_is_seen(schemas):
    """Each rule by a page that breaks it, or this file would pass on anything."""
    schema = next(s for s in schemas if s.node_id == "FrugalMaskGrow")
    page = (PAGES / "FrugalMaskGrow.md").read_text("utf-8")
    assert faults(schema, page) == []
    assert faults(schema, page.replace("grow_shape", "shape")) == ["input grow_shape is not named"]
    assert faults(schema, page.replace("## Cost", "## Price")) == ["no section 'Cost'"]
    assert len(faults(schema, page.replace("![The node]", "![A picture]"))) == 1
    assert len(faults(schema, page.replace("**inverted**", "the rest"))) == 1
    assert len(faults(schema, page.replace("| input |", "| input | unit |"))) == 1
    assert len(faults(schema, page.replace("# Grow Mask (px)\n", "# Grow\n"))) == 1
    first = f"({schema.node_id}.png)\n"
    assert len(faults(schema, page.replace(first, first + FOLD * "word "))) == 1
    assert len(faults(schema, page + LONG * "word ")) == 1
    assert len(faults(schema, page.replace("## Inputs", "## In short\n\n- one\n\n## Inputs"))) == 1
    assert len(faults(schema, page + "\n| a | b | c | d | e |\n")) == 1


def test_every_node_has_a_picture(schemas):
    sizes = {}
    for schema in schemas:
        path = PAGES / f"{schema.node_id}.png"
        assert path.is_file(), f"{path.name} is missing: python -m demo.node_pictures makes it"
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 250 and picture.height > 70, path
            # A canvas on which nothing was drawn yet has a handful of colours.
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 30, path
        sizes[path.name] = path.stat().st_size
    assert max(sizes.values()) <= LARGEST_PICTURE, sizes
    assert sum(sizes.values()) <= LARGEST_SUM
    strays = {path.name for path in PAGES.glob("*.png")} - set(sizes)
    assert not strays, f"pictures of no node: {sorted(strays)}"


def test_every_picture_shows_its_node_as_it_is(nodes):
    found = [node.GET_NODE_INFO_V1() for node in nodes]
    stale = [info["name"] for info in found if shown(info["name"]) != shows(info)]
    assert not stale, f"python -m demo.node_pictures --tree DIR draws them again: {stale}"
    assert shown("NoSuchNode") is None


def test_a_picture_goes_stale_with_what_it_shows(nodes):
    info = next(node for node in nodes if node.__name__ == "FrugalMaskGrow").GET_NODE_INFO_V1()
    given = info["input"]["required"]
    kind, options = given["grow"]
    changed = [
        info | {"display_name": "Grow"},
        info | {"output_name": ["mask"]},
        info | {"input": {"required": {**given, "more": ("INT", {})}}},
        info | {"input": {"required": {**given, "grow": (kind, {**options, "default": 9})}}},
        info | {"input": {"required": dict(reversed(given.items()))}},
    ]
    assert len({shows(each) for each in (info, *changed)}) == 6


def test_nodes_are_found_by_other_words(schemas):
    from comfy_api.v0_0_2 import io

    if "search_aliases" not in inspect.signature(io.Schema).parameters:
        pytest.skip("this ComfyUI has no search_aliases")
    bare = [schema.node_id for schema in schemas if len(schema.search_aliases) < 2]
    assert not bare
    # No display name carries the pack's name, so the search has to.
    assert not [s.node_id for s in schemas if "frugal" not in s.search_aliases]
    assert not [s.display_name for s in schemas if "frugal" in s.display_name.lower()]


def test_words_of_other_scripts_are_in_use(schemas):
    words = json.loads((PAGES.parents[1] / "search_words.json").read_text("utf-8"))
    assert set(words) <= {schema.node_id for schema in schemas}
    if not hasattr(schemas[0], "search_aliases"):
        pytest.skip("this ComfyUI has no search_aliases")
    unused = [
        s.node_id for s in schemas if not set(words.get(s.node_id, ())) <= {*s.search_aliases}
    ]
    assert not unused, f"found_by(..., node_id) is not called with: {unused}"


def test_what_experts_need_is_folded_away(nodes):
    """Only inputs with a value of their own: what is folded away has to work untouched."""
    from comfy_api.v0_0_2 import io

    if "advanced" not in inspect.signature(io.Int.Input).parameters:
        pytest.skip("this ComfyUI folds nothing away")
    folded = {}
    for node in nodes:
        given = node.GET_NODE_INFO_V1()["input"]
        for name, (kind, *rest) in {
            **given.get("required", {}),
            **given.get("optional", {}),
        }.items():
            options = rest[0] if rest else {}
            if options.get("advanced"):
                assert "default" in options or kind == "COMBO", f"{node.__name__}.{name}"
                folded.setdefault(node.__name__, set()).add(name)
    assert {"tile_size", "overlap"} <= folded["FrugalWanDecodeToFile"]
    assert {"weight_dtype", "matmul"} <= folded["FrugalLoadWan"]
    assert "kv_dtype" in folded["FrugalCausalModel"] and "window" not in folded["FrugalCausalModel"]
