"""A real ComfyUI starts with the pack, knows its nodes and accepts the shipped graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frugal.demo.comfy_server import ServerError, pack_node_ids
from frugal.tests.helpers.graphs import faults, skip_if_too_old

pytestmark = pytest.mark.comfy
WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))


def test_every_node_is_there(server):
    info = server.object_info()
    assert pack_node_ids()
    for node in sorted(pack_node_ids()):
        assert info[node]["category"].startswith("Frugal/"), node
        assert info[node]["description"] and info[node]["display_name"], node


def test_no_family_is_off(server):
    off = [line for line in server.log_text().splitlines() if "nodes are off: " in line]
    assert not off


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_graph_fits_this_comfyui(server, path):
    skip_if_too_old(server, path)
    prompt = server.convert(json.loads(path.read_text(encoding="utf-8")))
    assert any(node["class_type"].startswith("Frugal") for node in prompt.values())
    assert faults(prompt, server.object_info()) == []


def picture_graph(name: str = "example.png") -> dict:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {
            "class_type": "SaveImage",
            "inputs": {"images": ["2", 0], "filename_prefix": "bed"},
        },
    }


def test_a_planted_fault_is_found(server):
    """The check above would mean nothing if it let these through."""
    info = server.object_info()
    assert faults(picture_graph(), info) == []
    planted = [
        ("1", "image", "no_such_choice"),
        ("2", "image", ["1", 1]),
        ("2", "image", ["1", 7]),
        ("2", "image", ["9", 0]),
        ("2", "surplus", 1),
        ("3", "filename_prefix", 5),
    ]
    for node, name, value in planted:
        graph = picture_graph()
        graph[node]["inputs"][name] = value
        assert len(faults(graph, info)) == 1, (node, name, value)
    graph = picture_graph()
    del graph["3"]["inputs"]["images"]
    assert len(faults(graph, info)) == 1
    graph["3"]["class_type"] = "NoSuchNode"
    assert len(faults(graph, info)) == 1
    empty = {
        "class_type": "EmptyImage",
        "inputs": {"width": 0, "height": 8, "batch_size": 1, "color": 0},
    }
    assert len(faults({"1": empty}, info)) == 1


def test_a_picture_goes_in_and_comes_out(server, tmp_path):
    import io

    from PIL import Image

    Image.new("RGB", (64, 48), (255, 40, 0)).save(tmp_path / "red.png")
    steps = []
    name = server.upload(tmp_path / "red.png")
    result = server.run(picture_graph(name), lambda *step: steps.append(step[0]))
    assert (result.status, result.errors) == ("success", [])
    assert result.executed == steps == ["1", "2", "3"]
    [(node, file)] = result.files()
    picture = Image.open(io.BytesIO(server.view(**file)))
    assert (node, picture.size, picture.getpixel((0, 0))) == ("3", (64, 48), (0, 215, 255))
    assert server.rss_bytes() <= server.peak_rss()


def test_a_graph_refused_in_part_is_refused(server, tmp_path):
    """ComfyUI would run the valid branch and call it a success."""
    from PIL import Image

    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    graph = picture_graph(server.upload(tmp_path / "black.png"))
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}
    with pytest.raises(ServerError, match="node 4"):
        server.run(graph)
    with pytest.raises(ServerError, match="refused"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_the_server_goes_on_after_a_cancel(server, tmp_path):
    """It ends the run as interrupted, and the next run works."""
    from frugal.demo.tiny_wan import fill, save, vae_shapes

    save(fill(vae_shapes(), 3), server.models / "vae" / "wan_cancel.safetensors")
    decode = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "wan_cancel.safetensors"}},
        "2": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        },
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }

    never = {"class_type": "TestWait", "inputs": {"value": str(tmp_path / "never")}}

    def cancel(node: str, *_: int) -> None:
        if node == "5":
            server.interrupt()

    assert server.run({**decode, "5": never}, cancel).status == "interrupted"
    done = server.run(decode)
    assert done.status == "success"
    assert len(list(done.files())) == 5
