"""Quantise through a real server, then sample from the new file with both loaders."""

from __future__ import annotations

import comfy.quant_ops
import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy
pytest.importorskip("comfy_kitchen")
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
TARGETS = {"fp8": "fp8", "int8 ConvRot": "int8_convrot"}
if "int8_tensorwise" not in KNOWN:
    del TARGETS["int8 ConvRot"]
WIDGETS = {
    "size_gb": 1.0, "calibration": "none", "lora_name": "none", "lora_strength": 1.0,
    "measure": True, "overwrite": True, "allow_int8": True, "allow_fp8": True, "allow_w4a8": False,
    "allow_w4a8_g64": False, "allow_awq": False, "filename_prefix": "chain",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(server):
    return {key: path.name for key, path in build_demo_wan(server.models).items()}


def quantise(server, files, **changed):
    inputs = {**WIDGETS, "model_name": files["t2v"], **changed}
    nodes = {
        "1": {"class_type": "FrugalQuantize", "inputs": inputs},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 2]}},
    }
    return server.run(nodes)


def frames(server, files, loader: dict) -> np.ndarray:
    """Two steps of the tiny model: uint8 [frames, height, width, 3]."""

    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    nodes = {
        "1": loader,
        "2": {"class_type": "FrugalLoadTextEmbeds", "inputs": {"embeds_name": files["positive"]}},
        "3": {"class_type": "FrugalLoadTextEmbeds", "inputs": {"embeds_name": files["negative"]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 8.0}},
        "6": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["5", 0], "positive": ["2", 0], "negative": ["3", 0],
                "latent_image": ["6", 0], "seed": 3, "steps": 2, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "q"}},
    }  # fmt: skip
    result = server.run(nodes)
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "9")


def stock(name: str) -> dict:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}}


def ours(name: str) -> dict:
    widgets = {"model_name": name, "weight_dtype": "default"}
    return {"class_type": "FrugalLoadWan", "inputs": widgets}


@pytest.mark.parametrize("target", TARGETS)
def test_quantise_then_sample(target, server, files):
    result = quantise(server, files, format=target)
    assert (result.status, result.errors) == ("success", [])
    name = f"chain_{TARGETS[target]}.safetensors"
    folder = server.models / "diffusion_models"
    assert (folder / name).is_file() and (folder / f"{name[:-12]}.quality.json").is_file()
    assert not list(folder.glob(f"{name[:-12]}*.part*"))
    # The chart of the errors came out as a picture.
    assert [node for node, _ in result.files()] == ["2"]
    original = frames(server, files, stock(files["t2v"])).astype(int)
    alone = frames(server, files, stock(name)).astype(int)
    packs = frames(server, files, ours(name)).astype(int)
    assert np.abs(alone - packs).max() <= 1
    assert 0 < np.abs(alone - original).mean() < 0.2 * original.std()


def test_mistake_is_told(server, files):
    result = quantise(server, files, format="target size", size_gb=0.001)
    assert result.status == "error"
    assert any(
        "the smallest size with the formats allowed" in str(error) for error in result.errors
    )
