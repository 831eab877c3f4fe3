"""The quantising graphs with tiny models put in: every step that their notes describe."""

from __future__ import annotations

import json

import comfy.quant_ops
import pytest

from frugal.demo.layout import WORKFLOWS
from frugal.demo.tiny_wan import WanSize, build_demo_wan, fill, save, wan_shapes
from frugal.tests.helpers.graphs import faults

pytestmark = pytest.mark.comfy
pytest.importorskip("comfy_kitchen")
NAME, SIZE = "graph_tiny", 0.0015
# What this ComfyUI loads.
INT8 = "int8_tensorwise" in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


@pytest.fixture(scope="module")
def files(server):
    found = {key: path.name for key, path in build_demo_wan(server.models).items()}
    shapes = wan_shapes(WanSize(dim=128, ffn=256, layers=1))
    save(fill(shapes, 9), server.models / "diffusion_models" / f"{NAME}.safetensors")
    return found


def opened(server, name: str) -> dict:
    """A shipped graph with everything unmuted, as the API takes it."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        node["mode"] = 0
    prompt = server.convert(graph)
    assert faults(prompt, server.object_info()) == []
    return prompt


def upstream(prompt: dict, *kinds: str) -> dict:
    """The nodes of these kinds with all that feeds them."""
    wanted = [key for key, node in prompt.items() if node["class_type"] in kinds]
    found = {}
    while wanted:
        key = wanted.pop()
        found[key] = prompt[key]
        links = (v for v in prompt[key]["inputs"].values() if isinstance(v, list))
        wanted += [link[0] for link in links if link[0] not in found]
    return found


def run(server, prompt: dict):
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    return result


def test_both_formats_are_made_with_their_pictures(server, files):
    prompt = opened(server, "quantize_wan")
    for node in prompt.values():
        if node["class_type"] == "FrugalQuantize":
            node["inputs"] |= {"model_name": f"{NAME}.safetensors", "filename_prefix": NAME}
    result = run(server, prompt)
    assert len(list(result.files())) == 2
    for ending in ("int8_convrot", "w4a8"):
        for kind in ("safetensors", "quality.json"):
            assert (server.models / "diffusion_models" / f"{NAME}_{ending}.{kind}").is_file()


def test_record_quantise_to_a_size_and_check(server, files):
    prompt = opened(server, "calibrate_wan")
    muted = json.loads((WORKFLOWS / "calibrate_wan.json").read_text(encoding="utf-8"))
    late = {str(node["id"]) for node in muted["nodes"] if node["mode"]}
    assert {prompt[key]["class_type"] for key in late} == {
        "FrugalQuantize", "FrugalLoadWan", "FrugalQualityCheck", "PreviewImage",
    }  # fmt: skip
    result_name = f"{NAME}_{SIZE:g}GB"
    calibration = {"calibration": f"{NAME}.safetensors"}
    for key, node in prompt.items():
        inputs = node["inputs"]
        match node["class_type"]:
            case "FrugalLoadWan":
                chosen = result_name if key in late else NAME
                inputs["model_name"] = f"{chosen}.safetensors"
            case "FrugalCalibrate":
                inputs |= {"name": NAME, "memory_gb": 0.02}
            case "CLIPTextEncode":
                node["class_type"] = "FrugalLoadTextEmbeds"
                node["inputs"] = {"embeds_name": files["positive"]}
            case "VAELoader":
                inputs["vae_name"] = files["vae"]
            case "EmptyHunyuanLatentVideo":
                inputs |= {"width": 64, "height": 64, "length": 5}
            case "KSampler":
                inputs |= {"steps": 2, "cfg": 1.0}
            case "FrugalQuantize":
                inputs |= calibration | {"model_name": f"{NAME}.safetensors", "size_gb": SIZE}
                inputs |= {"filename_prefix": NAME, "allow_w4a8": False}
                inputs |= {"allow_int8": INT8, "allow_fp8": not INT8}
            case "FrugalQualityCheck":
                inputs |= calibration | {"quality_file": f"{result_name}.quality.json"}
    folder = server.models / "diffusion_models"
    clip = run(server, upstream(prompt, "FrugalWanDecodeToFile"))
    assert [file["type"] for _, file in clip.files()] == ["output"]
    assert (server.models / "calibration" / f"{NAME}.safetensors").is_file()
    (quantize,) = (k for k, node in prompt.items() if node["class_type"] == "FrugalQuantize")
    made = run(server, {k: n for k, n in prompt.items() if k == quantize})
    (text,) = made.outputs[quantize]["text"]
    assert "layer sensitivity measured in 1 runs" in text
    assert (folder / f"{result_name}.safetensors").stat().st_size <= SIZE * 10**9 + 10_000
    held = folder / f"{result_name}.quality.json"
    before = json.loads(held.read_text())
    assert before["end_to_end"] is None
    checks = run(server, upstream(prompt, "FrugalQualityCheck"))
    (text,) = next(shown["text"] for shown in checks.outputs.values() if "text" in shown)
    after = json.loads(held.read_text())
    error = after["end_to_end"]["whole"]["relative"]
    assert 0 < error < 0.1 and f"rel-L2 {error:.4f}" in text
    assert len(after["end_to_end"]["calls"]) == 2 and after["layers"] == before["layers"]
