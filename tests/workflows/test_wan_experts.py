"""Two experts through a real server: one KSampler on the joined model equals two by hand."""

from __future__ import annotations

import numpy as np
import pytest

from frugal.demo.tiny_wan import T2V, build_demo_wan, fill, save, wan_shapes
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy
STEPS, SEED = 4, 7


def sampling(model: list, latent: list, kind: str, **widgets) -> dict:
    inputs = {
        "model": model, "positive": ["2", 0], "negative": ["3", 0], "latent_image": latent,
        "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", **widgets,
    }  # fmt: skip
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def nodes(server):
    files = {key: path.name for key, path in build_demo_wan(server.models).items()}
    nodes = {}
    for key, seed, name in (("h", 21, "experts_high"), ("l", 22, "experts_low")):
        path = server.models / "diffusion_models" / f"{name}.safetensors"
        save(fill(wan_shapes(T2V), seed), path)
        widgets = {"model_name": path.name, "weight_dtype": "default"}
        nodes[f"{key}0"] = {"class_type": "FrugalLoadWan", "inputs": widgets}
        shift = {"model": [f"{key}0", 0], "shift": 8.0}
        nodes[key] = {"class_type": "ModelSamplingSD3", "inputs": shift}
    for key, name in (("2", "positive"), ("3", "negative")):
        embeds = {"embeds_name": files[name]}
        nodes[key] = {"class_type": "FrugalLoadTextEmbeds", "inputs": embeds}
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    return nodes | {
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 0]}},
        "9": {
            "class_type": "SaveImage",
            "inputs": {"images": ["8", 0], "filename_prefix": "experts"},
        },
    }


def frames(server, prompt: dict, on_progress=None) -> np.ndarray:
    result = server.run(prompt, on_progress)
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "9")


def joined(nodes: dict, high: str = "h", low: str = "l", **widgets) -> dict:
    inputs = {"high_noise": [high, 0], "low_noise": [low, 0], "boundary": 0.875, **widgets}
    return nodes | {
        "6": {"class_type": "FrugalWanTwoExperts", "inputs": inputs},
        "7": sampling(["6", 0], ["5", 0], "KSampler", seed=SEED, denoise=1.0),
    }


def by_hand(nodes: dict, high: str, low: str, switch: int) -> dict:
    first = sampling(
        [high, 0], ["5", 0], "KSamplerAdvanced", add_noise="enable", noise_seed=SEED,
        start_at_step=0, end_at_step=switch, return_with_leftover_noise="enable",
    )  # fmt: skip
    second = sampling(
        [low, 0], ["6", 0], "KSamplerAdvanced", add_noise="disable", noise_seed=SEED,
        start_at_step=switch, end_at_step=10000, return_with_leftover_noise="disable",
    )  # fmt: skip
    return nodes | {"6": first, "7": second}


def test_same_frames_as_two_samplers(server, nodes):
    steps = []

    def follow(node: str, value: int, maximum: int) -> None:
        if node == "7" and maximum:
            steps.append((value, maximum))

    ours = frames(server, joined(nodes), follow)
    # simple, 4 steps, shift 8: noise levels 1, 0.96, 0.89, 0.73.
    np.testing.assert_array_equal(ours, frames(server, by_hand(nodes, "h", "l", 3)))
    assert steps[-1] == (STEPS, STEPS) and steps == sorted(steps)
    for other in (by_hand(nodes, "h", "l", 2), by_hand(nodes, "l", "h", 3)):
        assert np.abs(frames(server, other).astype(int) - ours).mean() > 0.5


def test_one_file_twice_is_refused(server, nodes):
    result = server.run(joined(nodes, "h", "h"))
    assert result.status == "error"
    assert any("hold the same weights" in str(error) for error in result.errors)
