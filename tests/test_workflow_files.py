"""What every shipped graph must say of the files it names, so that the page can offer them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frugal.demo.tiny_wan import build_demo_wan

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
WEIGHTS = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".bin")
MUTED = 2
FOLDERS = {
    "CatVTON", "checkpoints", "clip_vision", "diffusion_models", "frame_interpolation", "loras",
    "text_encoders", "upscale_models", "vae",
}  # fmt: skip


def nodes(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["nodes"]


def weights(node: dict) -> list[str]:
    """Weight files that the node's widgets name."""
    values = [value for value in node.get("widgets_values", []) if isinstance(value, str)]
    return [value for value in values if "\n" not in value and value.endswith(WEIGHTS)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> set[str]:
    """Weights that come with the demo or that it makes, as a loader may name them."""
    made = tmp_path_factory.mktemp("models")
    build_demo_wan(made)
    folders = (ROOT / "demo" / "models", made)
    return {path.name for models in folders for path in models.rglob("*.safetensors")}


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_every_file_is_offered_or_comes_with_the_demo(path, ours):
    text = "\n".join(n["widgets_values"][0] for n in nodes(path) if n["type"] == "MarkdownNote")
    for node in nodes(path):
        offered = node["properties"].get("models", [])
        assert {entry["name"] for entry in offered} <= set(weights(node)), node["type"]
        for entry in offered:
            address, _, file = entry["url"].rpartition("/")
            # Else the page refuses to download it, or the browser saves it under another name.
            assert address.startswith("https://huggingface.co/") and file == entry["name"]
            assert entry["directory"] in FOLDERS
        for named in weights(node):
            # On Windows the lists have another separator, and the page would not find the file.
            assert not {"/", "\\"} & set(named), named
            if node["mode"] == MUTED or named in ours:
                continue
            # The page looks for the entry that has the widget's value to the letter, no other.
            assert named in [entry["name"] for entry in offered], f"where is {named} from?"
            # For those who read, and for a page that offers nothing.
            assert named in text, f"the note leaves out {named}"


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_every_node_names_its_pack(path):
    """The page looks missing nodes up by these."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for node in nodes(path):
        if node["type"] == "MarkdownNote":
            continue
        said = (node["properties"]["cnr_id"], node["properties"]["ver"])
        if node["type"].startswith("Frugal"):
            assert said == (project["name"], project["version"]), node["type"]
        else:
            assert said[0] == "comfy-core" and said[1], node["type"]
