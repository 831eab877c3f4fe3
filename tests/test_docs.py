"""The pages that people read: links lead somewhere, the graphs are named as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from frugal.tests.helpers.tracked import tracked_or_skip

ROOT = Path(__file__).resolve().parent.parent


def dead_links(path: Path) -> list[str]:
    """Relative links and pictures of a page that lead nowhere, anchors included."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists():
            found.append(target)
        elif anchor and page.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            if anchor not in slugs:
                found.append(target)
    return found


def test_links_lead_somewhere():
    pages = [ROOT / name for name in tracked_or_skip() if name.endswith(".md")]
    found = {page.name: dead_links(page) for page in pages}
    assert {page: links for page, links in found.items() if links} == {}


def test_pages_named_in_sources_exist():
    missing = set()
    for name in tracked_or_skip():
        if name.endswith((".py", ".md", ".json")) and not name.startswith("tests/test_docs"):
            for page in re.findall(
                r"(?<![\w/])docs/[\w/.\-]+\.md", (ROOT / name).read_text("utf-8")
            ):
                if not any((at / page).exists() for at in (ROOT, ROOT / "nodes" / "web")):
                    missing.add((name, page))
    assert missing == set()


def test_a_dead_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](gone.md) [b](#one-two) [c](#three) [d](https://x.org)\n")
    assert dead_links(page) == ["gone.md", "#three"]


@pytest.mark.parametrize("page", ["README.md", "docs/start-12gb.md"])
def test_every_graph_that_is_named_is_shipped(page):
    shipped = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    text = (ROOT / page).read_text("utf-8")
    named = set(
        re.findall(r"`((?:wan|tryon|quantize|calibrate|causal|long|masks|remote)[\w.]*)`", text)
    )
    assert named <= shipped
    if page == "README.md":
        assert shipped <= named, "graphs that nobody hears of"


def test_the_licence_comes_before_the_install():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.index("non-commercial") < text.index("ComfyUI-Manager")
