"""The sampler and its parts on a real server, beside ComfyUI's KSampler."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy
STEPS = 4


@pytest.fixture(scope="module")
def files(server):
    return {key: path.name for key, path in build_demo_wan(server.models).items()}


def graph(files, **sampler) -> dict:
    """Text to a clip of 5 frames through the given kinds of sampler, each saved as pictures."""
    embeds = "FrugalLoadTextEmbeds"
    common = {
        "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["5", 0], "seed": 7,
        "steps": STEPS, "cfg": 3.0, "sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    loader = {"model_name": files["t2v"], "weight_dtype": "default"}
    nodes = {
        "1": {"class_type": "FrugalLoadWan", "inputs": loader},
        "2": {"class_type": embeds, "inputs": {"embeds_name": files["positive"]}},
        "3": {"class_type": embeds, "inputs": {"embeds_name": files["negative"]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        },
        "cache": {
            "class_type": "FrugalStepCache",
            "inputs": {
                "base_model": ["1", 0], "threshold": 0.0, "start_percent": 0.0,
                "end_percent": 1.0, "max_skips": 3,
            },
        },
        "range": {
            "class_type": "FrugalGuidanceRange",
            "inputs": {"base_model": ["cache", 0], "start_percent": 0.0, "end_percent": 1.0},
        },
        "stock": {"class_type": "KSampler", "inputs": {"model": ["1", 0], **common}},
        "parts": {"class_type": "KSampler", "inputs": {"model": ["range", 0], **common}},
    }  # fmt: skip
    for name, preset in (("off", "off"), ("distilled", "distilled")):
        inputs = {"model": ["1", 0], "preset": preset, "preview": "colours of the middle frame"}
        nodes[name] = {"class_type": "FrugalSampler", "inputs": {**common, **inputs}}
        for slot, kind in ((1, "text"), (2, "data")):
            nodes[f"{name} {kind}"] = {
                "class_type": "PreviewAny", "inputs": {"source": [name, slot]},
            }  # fmt: skip
    for name in ("stock", "parts", "off", "distilled"):
        nodes[f"decode {name}"] = {
            "class_type": "VAEDecode", "inputs": {"samples": [name, 0], "vae": ["4", 0]},
        }  # fmt: skip
        nodes[f"save {name}"] = {
            "class_type": "SaveImage",
            "inputs": {"images": [f"decode {name}", 0], "filename_prefix": f"sampler_{name}"},
        }
    return nodes


def test_off_and_open_parts_equal_the_ksampler(server, files):
    result = server.run(graph(files))
    assert (result.status, result.errors) == ("success", [])
    assert result.previews
    stock = saved(server, result, "save stock")
    assert stock.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(saved(server, result, "save off"), stock)
    np.testing.assert_array_equal(saved(server, result, "save parts"), stock)
    assert np.abs(saved(server, result, "save distilled").astype(int) - stock).mean() > 0.5
    text = {node: "".join(out["text"]) for node, out in result.outputs.items() if "text" in out}
    assert "preset off" in text["off text"]
    data = json.loads(text["distilled data"])
    assert (data["cfg"], data["steps"]) == (1.0, STEPS)
    assert data["notes"][0].startswith("cfg 3 became 1")


def test_an_empty_range_names_the_fix(server, files):
    prompt = graph(files)
    prompt["cache"]["inputs"] |= {"threshold": 0.1, "start_percent": 0.9, "end_percent": 0.2}
    result = server.run(prompt)
    assert result.status == "error"
    assert "lower the start or raise the end" in str(result.errors)
