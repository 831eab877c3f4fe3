"""The graphs that make a Wan video, with tiny models put in: from the card to the file."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from PIL import Image

from frugal.demo.layout import WORKFLOWS
from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.graphs import faults

pytestmark = pytest.mark.comfy
WIDTH, HEIGHT, FRAMES = 64, 96, 9


@pytest.fixture(scope="module")
def files(server):
    found = {key: path.name for key, path in build_demo_wan(server.models).items()}
    picture = np.linspace(0, 255, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(picture).save(server.base / "input" / "graph_first.png")
    return found


def small(server, files, name: str, model: str) -> dict:
    """A shipped graph with tiny files, few frames and steps, as the API takes it."""
    prompt = server.convert(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    texts = [k for k, node in prompt.items() if node["class_type"] == "FrugalCachedTextEncode"]
    kinds = ("positive", "negative")
    for node in prompt.values():
        inputs = node["inputs"]
        for at, link in inputs.items():
            if isinstance(link, list) and link[0] in texts:
                inputs[at] = [f"stored_{kinds[link[1]]}", 0]
        match node["class_type"]:
            case "FrugalLoadWan":
                inputs["model_name"] = files[model]
            case "VAELoader":
                inputs["vae_name"] = files["vae"]
            case "LoadImage":
                inputs["image"] = "graph_first.png"
            case "EmptyHunyuanLatentVideo" | "WanImageToVideo":
                inputs |= {"width": WIDTH, "height": HEIGHT, "length": FRAMES}
                inputs.pop("clip_vision_output", None)
            case "FrugalSampler":
                inputs["steps"] = 2
            case "FrugalCausalSampler":
                inputs |= {"steps": 2, "frames_per_block": 1}
    for kind in kinds:
        embeds = {"embeds_name": files[kind]}
        prompt[f"stored_{kind}"] = {"class_type": "FrugalLoadTextEmbeds", "inputs": embeds}
    gone = ("FrugalCachedTextEncode", "CLIPVisionLoader", "CLIPVisionEncode")
    return {key: node for key, node in prompt.items() if node["class_type"] not in gone}


def frames(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def videos(server, prompt: dict) -> list:
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    found = [entry for _, entry in result.files() if entry["filename"].endswith(".mp4")]
    return [server.output / entry["subfolder"] / entry["filename"] for entry in found]


@pytest.mark.parametrize(("name", "model"), [("wan_t2v_1.3b", "t2v"), ("wan_i2v_14b_12gb", "i2v")])
def test_one_video(server, files, name, model):
    prompt = small(server, files, name, model)
    [path] = videos(server, prompt)
    made = frames(path)
    assert len(made) == FRAMES and made[0].shape == (HEIGHT, WIDTH, 3)


def test_two_ways_on_from_one_beginning(server, files):
    made = [frames(path) for path in videos(server, small(server, files, "causal_video", "t2v"))]
    assert [len(each) for each in made] == [FRAMES] * 3
    # All prompts are the same here: the two go apart by their seeds alone.
    assert not np.array_equal(made[1][0], made[2][0])


@pytest.mark.parametrize("name", ["wan_t2v_1.3b", "wan_i2v_14b_12gb", "causal_video"])
def test_the_graph_as_shipped_is_understood(server, name):
    """All that it lacks here are the public files."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    assert faults(server.convert(graph), server.object_info()) == []
