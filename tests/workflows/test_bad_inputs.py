"""Mistakes in the demo graph: each gives a clear error on the node, and the server goes on."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from frugal.demo import run as demo
from frugal.demo.comfy_server import ServerError
from frugal.demo.layout import MODELS, WORKFLOWS
from frugal.demo.tiny_wan import build_demo_wan

pytestmark = pytest.mark.comfy
WAN = "wan_tiny_random_i2v.safetensors"


@pytest.fixture(scope="module")
def demo_server(server):
    """The shared server with the demo's models in its own folder."""
    shutil.copytree(MODELS, server.models, dirs_exist_ok=True)
    build_demo_wan(server.models)
    return server


@pytest.fixture(scope="module")
def prompt(demo_server, tmp_path_factory):
    """The demo graph, small and still, with the first swap's pictures uploaded."""
    graph = demo_server.convert(json.loads((WORKFLOWS / "tryon_demo.json").read_text()))
    before, mask, garment, _ = demo.swap(0)
    folder = tmp_path_factory.mktemp("pictures")
    pictures = zip(demo.INPUTS, (before, mask, garment), strict=True)
    names = tuple(demo.upload(demo_server, folder, f"bad_{name}", p) for name, p in pictures)
    graph = demo.set_pictures(graph, names)
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    return graph


def one(graph: dict, kind: str) -> dict:
    """Inputs of the only node of that kind."""
    (found,) = (node["inputs"] for node in graph.values() if node["class_type"] == kind)
    return found


def still(graph: dict) -> dict:
    return demo.without(copy.deepcopy(graph), demo.VIDEO_OUTPUTS)


def refused(server, graph: dict) -> str:
    """The one error of a run that must fail, whether at the door or on the node."""
    try:
        result = server.run(graph)
    except ServerError as error:
        return str(error)
    assert result.status == "error" and len(result.errors) == 1
    return result.errors[0]


def assert_alive(server, graph: dict) -> None:
    result = server.run(still(graph))
    assert (result.status, result.errors) == ("success", [])


def test_missing_model_is_named(demo_server, prompt):
    graph = still(prompt)
    one(graph, "FrugalLoadCatVTON")["base"] = "not_there.safetensors"
    said = refused(demo_server, graph)
    assert "not_there.safetensors is not in models/" in said and "https://" in said
    assert_alive(demo_server, prompt)


def test_wrong_base_says_which_file_to_get(demo_server, prompt):
    path = demo_server.models / "diffusion_models" / "four_channels.safetensors"
    state = load_file(MODELS / "diffusion_models" / "frugal_demo_tryon_base.safetensors")
    state["conv_in.weight"] = state["conv_in.weight"][:, :4].contiguous()
    save_file(state, path)
    graph = still(prompt)
    one(graph, "FrugalLoadCatVTON")["base"] = path.name
    demo_server.object_info(fresh=True)
    message = refused(demo_server, graph)
    assert "FrugalLoadCatVTON" in message and "4" in message and "9" in message
    assert "inpaint" in message.lower()
    assert_alive(demo_server, prompt)


@pytest.mark.parametrize("kind", ["FrugalLoadCatVTON", "FrugalLoadWan"])
def test_corrupt_safetensors(demo_server, prompt, kind):
    source = {
        "FrugalLoadCatVTON": MODELS / "diffusion_models" / "frugal_demo_tryon_base.safetensors",
        "FrugalLoadWan": demo_server.models
        / "diffusion_models"
        / "wan_tiny_random_i2v.safetensors",
    }[kind]
    path = demo_server.models / "diffusion_models" / f"cut_{kind}.safetensors"
    path.write_bytes(source.read_bytes()[:-1000])
    graph = copy.deepcopy(prompt)
    if kind == "FrugalLoadWan":
        one(graph, kind)["model_name"] = path.name
    else:
        one(graph, kind)["base"] = path.name
    message = refused(demo_server, graph)
    assert kind in message and path.name in message and "expected" in message
    assert_alive(demo_server, prompt)


def test_wan_file_without_scales_is_refused(demo_server, prompt):
    import torch

    source = demo_server.models / "diffusion_models" / WAN
    path = demo_server.models / "diffusion_models" / "wan_int8_no_scales.safetensors"
    state = load_file(source)
    key = "blocks.0.ffn.0.weight"
    state[key] = (state[key].float() * 400).clamp(-127, 127).to(torch.int8)
    save_file(state, path)
    graph = copy.deepcopy(prompt)
    one(graph, "FrugalLoadWan")["model_name"] = path.name
    message = refused(demo_server, graph)
    assert "FrugalLoadWan" in message and "blocks.0.ffn.0" in message and path.name in message
    assert_alive(demo_server, prompt)


BAD_PICTURES = {
    "mask of another size": ("FrugalTryOnPrepare", "mask", np.full((50, 90, 3), 255, np.uint8)),
    "empty mask": ("FrugalTryOnPrepare", "mask", np.zeros((192, 128, 3), np.uint8)),
    "1x1 person": ("FrugalTryOnPrepare", "person", np.zeros((1, 1, 3), np.uint8)),
    "1x1 garment": ("FrugalTryOnPrepare", "garment", np.zeros((1, 1, 3), np.uint8)),
}


def with_picture(server, prompt: dict, folder, role: str, array: np.ndarray) -> dict:
    graph = still(prompt)
    place = {"person": 0, "mask": 1, "garment": 2}[role]
    old = [f"bad_{name}" for name in demo.INPUTS][place]
    new = demo.upload(server, folder, f"odd_{role}_{'x'.join(map(str, array.shape))}.png", array)
    return json.loads(json.dumps(graph).replace(json.dumps(old), json.dumps(new)))


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_picture(demo_server, prompt, tmp_path, case):
    kind, role, array = BAD_PICTURES[case]
    message = refused(demo_server, with_picture(demo_server, prompt, tmp_path, role, array))
    assert message.startswith(f"{kind}: ") and "expected" in message, message
    assert_alive(demo_server, prompt)


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_rgba_and_grey_pictures_run(demo_server, prompt, tmp_path, mode):
    before, _, garment, _ = demo.swap(0)
    for role, array in (("person", before), ("garment", garment)):
        grey = array.mean(-1).astype(np.uint8)
        odd = grey if mode == "L" else np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
        result = demo_server.run(with_picture(demo_server, prompt, tmp_path, role, odd))
        assert (result.status, result.errors) == ("success", [])


def test_zero_frames(demo_server, prompt):
    graph = copy.deepcopy(prompt)
    one(graph, "WanImageToVideo")["length"] = 0
    assert "length" in refused(demo_server, graph)
    assert_alive(demo_server, prompt)
