"""Cached cross-attention through a real server: the same frames, run after run."""

from __future__ import annotations

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy


def graph(server, constant: bool, seed: int) -> dict:
    files = {key: path.name for key, path in build_demo_wan(server.models).items()}
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    nodes = {
        "1": ("FrugalLoadWan", {"model_name": files["t2v"], "weight_dtype": "default"}),
        "2": ("FrugalLoadTextEmbeds", {"embeds_name": files["positive"]}),
        "3": ("FrugalLoadTextEmbeds", {"embeds_name": files["negative"]}),
        "4": ("VAELoader", {"vae_name": files["vae"]}),
        "5": ("EmptyHunyuanLatentVideo", size),
        "6": (
            "KSampler",
            {
                "model": ["10", 0] if constant else ["1", 0], "positive": ["2", 0],
                "negative": ["3", 0], "latent_image": ["5", 0], "seed": seed, "steps": 3,
                "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        ),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["4", 0]}),
        "8": ("SaveImage", {"images": ["7", 0], "filename_prefix": "context"}),
    }  # fmt: skip
    if constant:
        widgets = {"kv_dtype": "as computed", "contexts": 8, "release_weights": True}
        nodes["10"] = ("FrugalWanConstantContext", {"wan_model": ["1", 0], **widgets})
        nodes["11"] = ("PreviewAny", {"source": ["10", 1]})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def run(server, constant: bool, seed: int):
    result = server.run(graph(server, constant, seed))
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "8"), result


def test_same_frames_in_every_run(server):
    wanted = {seed: run(server, False, seed)[0] for seed in (1, 2)}
    assert np.abs(wanted[1].astype(int) - wanted[2]).mean() > 0.5
    for seed in (1, 2):
        frames, result = run(server, True, seed)
        np.testing.assert_array_equal(frames, wanted[seed])
    shown = str(result.outputs)
    assert "4 cross-attention projections" in shown and "% of the blocks' weights" in shown
