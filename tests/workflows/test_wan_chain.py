"""Tiny Wan through a whole graph on a real server: the pack's loaders beside ComfyUI's own."""

from __future__ import annotations

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy
STEPS = 2


@pytest.fixture(scope="module")
def files(server):
    """Name of each tiny file inside its models folder."""
    return {key: path.name for key, path in build_demo_wan(server.models).items()}


def graph(model: dict, files: dict[str, str], picture: str | None, seed: int = 7) -> dict:
    """Text (and picture) to a five-frame clip of 64 x 64, saved as pictures."""
    embeds = "FrugalLoadTextEmbeds"
    latent = (
        {"class_type": "EmptyHunyuanLatentVideo", "inputs": {}}
        if picture is None
        else {
            "class_type": "WanImageToVideo",
            "inputs": {
                "positive": ["2", 0], "negative": ["3", 0], "vae": ["4", 0],
                "start_image": ["9", 0],
            },
        }
    )  # fmt: skip
    latent["inputs"] |= {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    conditions = [["2", 0], ["3", 0], ["6", 0]] if picture is None else [["6", i] for i in range(3)]
    nodes = {
        "1": model,
        "2": {"class_type": embeds, "inputs": {"embeds_name": files["positive"]}},
        "3": {"class_type": embeds, "inputs": {"embeds_name": files["negative"]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 8.0}},
        "6": latent,
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["5", 0], "positive": conditions[0], "negative": conditions[1],
                "latent_image": conditions[2], "seed": seed, "steps": STEPS, "cfg": 3.0,
                "sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 0]}},
        "10": {
            "class_type": "SaveImage",
            "inputs": {"images": ["8", 0], "filename_prefix": "chain"},
        },
    }  # fmt: skip
    if picture:
        nodes["9"] = {"class_type": "LoadImage", "inputs": {"image": picture}}
    return nodes


def frugal_loader(files: dict[str, str], key: str) -> dict:
    widgets = {"model_name": files[key], "weight_dtype": "default"}
    return {"class_type": "FrugalLoadWan", "inputs": widgets}


def stock_loader(files: dict[str, str], key: str) -> dict:
    widgets = {"unet_name": files[key], "weight_dtype": "default"}
    return {"class_type": "UNETLoader", "inputs": widgets}


def frames(server, prompt: dict, on_progress=None) -> np.ndarray:
    """Run the graph; uint8 [frames, height, width, 3]."""
    result = server.run(prompt, on_progress)
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "10")


@pytest.fixture(scope="module")
def picture(server, tmp_path_factory):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("start") / "start.png"
    Image.fromarray(noise).save(path)
    return server.upload(path)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_same_frames_as_the_stock_loader(server, files, picture, kind):
    start = picture if kind == "i2v" else None
    steps = []

    def follow(node: str, value: int, maximum: int) -> None:
        if node == "7" and maximum:
            steps.append((value, maximum))

    ours = frames(server, graph(frugal_loader(files, kind), files, start), follow)
    stock = frames(server, graph(stock_loader(files, kind), files, start))
    assert ours.shape == (5, 64, 64, 3)
    assert steps[-1] == (STEPS, STEPS)
    np.testing.assert_array_equal(ours, stock)
    # Guards: the comparison is of real content, and the seed and the text reach it.
    assert ours.std() > 10
    other_seed = frames(server, graph(frugal_loader(files, kind), files, start, seed=8))
    assert np.abs(other_seed.astype(int) - ours).mean() > 1
    swapped = {**files, "positive": files["negative"], "negative": files["positive"]}
    other_text = frames(server, graph(frugal_loader(files, kind), swapped, start))
    assert np.abs(other_text.astype(int) - ours).mean() > 0.5
