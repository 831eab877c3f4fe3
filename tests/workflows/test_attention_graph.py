"""FrugalAttention in a graph on a real server: the same video, and a table in the run report."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def files(server):
    return {key: path.name for key, path in build_demo_wan(server.models).items()}


def graph(files, kernel=None, allow_8bit=False) -> dict:
    embeds = "FrugalLoadTextEmbeds"
    nodes = {
        "1": {
            "class_type": "FrugalLoadWan",
            "inputs": {"model_name": files["t2v"], "weight_dtype": "default"},
        },
        "2": {"class_type": embeds, "inputs": {"embeds_name": files["positive"]}},
        "3": {"class_type": embeds, "inputs": {"embeds_name": files["negative"]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        },
        "6": {
            "class_type": "FrugalAttention",
            "inputs": {
                "base_model": ["1", 0], "kernel": kernel, "allow_8bit": allow_8bit,
                "start_percent": 0.0, "end_percent": 1.0,
            },
        },
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["6", 0], "positive": ["2", 0], "negative": ["3", 0],
                "latent_image": ["5", 0], "seed": 7, "steps": 2, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "att"}},
        "10": {
            "class_type": "FrugalReport",
            "inputs": {
                "model": ["6", 0], "images": ["8", 0], "price_per_hour": 0.0, "currency": "USD",
            },
        },
    }  # fmt: skip
    if kernel is None:
        del nodes["6"], nodes["10"]
        nodes["7"]["inputs"]["model"] = ["1", 0]
    return nodes


def frames(server, result) -> np.ndarray:
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "9")


def test_the_same_video_and_a_table(server, files):
    plain = frames(server, server.run(graph(files))).astype(int)
    seen = {}
    for kernel in ("auto", "chunked", "auto"):
        result = server.run(graph(files, kernel))
        assert np.abs(frames(server, result).astype(int) - plain).max() <= 1
        data = json.loads(result.outputs["10"]["frugal_report"][0])
        (table,) = data["attention"]
        seen.setdefault(kernel, []).append(table["rows"])
    assert plain.std() > 10
    assert {row["backend"] for row in seen["chunked"][0]} == {"chunked"}
    first, again = ({row["source"] for row in rows} for rows in seen["auto"])
    assert first == {"measured"} and again <= {"measured", "remembered"}
    assert "[Frugal] attention on cpu" in server.log_text()
    assert (server.base / "user" / "frugal" / "attention.json").is_file()


def test_a_kernel_that_is_not_there(server, files):
    result = server.run(graph(files, "kitchen-int8", allow_8bit=True))
    assert result.status == "error"
    assert any("kitchen-int8 runs on cuda, not on cpu" in error for error in result.errors)
