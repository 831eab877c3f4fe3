"""A planned model in a whole graph on a real server: the same frames, and the plan on the node."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy


def graph(files: dict[str, str], planned: bool) -> dict:
    """Text to five frames of 64 x 64 at cfg 1, so that there is one condition either way."""
    plan = {
        "model": ["2", 0], "vae": ["3", 0], "latent": ["5", 0], "width": 832, "height": 480,
        "frames": 81, "batch_size": 1, "guidance": False, "budget_gb": 0.01,
    }  # fmt: skip
    nodes = {
        "1": ("FrugalLoadWan", {"model_name": files["t2v"], "weight_dtype": "default"}),
        "2": ("ModelSamplingSD3", {"model": ["1", 0], "shift": 8.0}),
        "3": ("VAELoader", {"vae_name": files["vae"]}),
        "4": ("FrugalLoadTextEmbeds", {"embeds_name": files["positive"]}),
        "5": (
            "EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 5, "batch_size": 1}
        ),
        "6": ("FrugalMemoryPlan", plan),
        "7": (
            "KSampler",
            {
                "model": ["6" if planned else "2", 0], "positive": ["4", 0], "negative": ["4", 0],
                "latent_image": ["5", 0], "seed": 7, "steps": 2, "cfg": 1.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        ),
        "8": ("VAEDecode", {"samples": ["7", 0], "vae": ["3", 0]}),
        "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "memory_plan"}),
    }  # fmt: skip
    if not planned:
        del nodes["6"]
    return {key: {"class_type": kind, "inputs": values} for key, (kind, values) in nodes.items()}


def run(server, prompt: dict):
    """(outputs by node, uint8 [frames, height, width, 3])."""
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    return result.outputs, saved(server, result, "9")


def test_the_same_frames_with_a_plan(server):
    files = {key: path.name for key, path in build_demo_wan(server.models).items()}
    shown, planned = run(server, graph(files, True))
    data = json.loads(shown["6"]["frugal_memory_plan"][0])
    assert data["job"] == {
        "width": 64,
        "height": 64,
        "frames": 5,
        "batch": 1,
        "guided": False,
        "block": 0,
    }
    assert data["streamed"] > 0 and not data["memory_options"]["sequential"]
    verdict = shown["6"]["text"][0].split("\n")[0]
    assert verdict.startswith("does NOT fit: ") and "of 10.0 MB (" in verdict
    _, plain = run(server, graph(files, False))
    assert plain.shape == (5, 64, 64, 3) and plain.std() > 10
    np.testing.assert_array_equal(planned, plain)
