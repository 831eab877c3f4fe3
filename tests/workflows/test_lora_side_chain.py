"""Two unmerged LoRAs on an fp8 model through a real server, against a file with both merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frugal.demo.tiny_wan import build_demo_wan, save
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy


def low_rank_file(path, layers, seed) -> dict[str, torch.Tensor]:
    """Write a LoRA of rank 4; returns its dense changes."""
    make = torch.Generator().manual_seed(seed)
    tensors, dense = {}, {}
    for layer, (rows, width) in layers.items():
        up, down = (torch.randn(s, generator=make) / 16 for s in ((rows, 4), (4, width)))
        tensors[f"lora_unet_{layer.replace('.', '_')}.lora_up.weight"] = up
        tensors[f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"] = down
        dense[layer] = up @ down
    save(tensors, path)
    return dense


@pytest.fixture(scope="module")
def files(server):
    """The tiny files, an fp8 model, two LoRAs, and the float32 model that they stand for."""
    found = {key: path.name for key, path in build_demo_wan(server.models).items()}
    models, loras = server.models / "diffusion_models", server.models / "loras"
    loras.mkdir(exist_ok=True)
    tensors, _, meant = bed.scaled(bed.weights(), bed.E4, marker=torch.zeros(2).to(bed.E4))
    save(tensors, models / "side_fp8.safetensors")
    layers = {name: tuple(meant[f"{name}.weight"].shape) for name in bed.block_linears(meant)}
    wanted = dict(meant)
    for seed, strength in ((1, 0.9), (2, -0.6)):
        dense = low_rank_file(loras / f"side_{seed}.safetensors", layers, seed)
        for layer, change in dense.items():
            wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"] + strength * change
    save(wanted, models / "side_merged.safetensors")
    save({"nothing.alpha": torch.ones(1)}, loras / "side_foreign.safetensors")
    return found


def graph(files, model_name, *loras) -> dict:
    embeds = "FrugalLoadTextEmbeds"
    nodes = {
        "1": {
            "class_type": "FrugalLoadWan",
            "inputs": {"model_name": model_name, "weight_dtype": "default"},
        },
        "2": {"class_type": embeds, "inputs": {"embeds_name": files["positive"]}},
        "3": {"class_type": embeds, "inputs": {"embeds_name": files["negative"]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "side"}},
    }
    model = "1"
    for seed, strength in loras:
        key = f"lora{seed}"
        inputs = {"model": [model, 0], "lora_name": f"side_{seed}.safetensors"}
        inputs["strength"] = strength
        nodes[key] = {"class_type": "FrugalLoraSide", "inputs": inputs}
        # PreviewAny shows the report, so that the test sees what a person sees.
        nodes[f"text{seed}"] = {"class_type": "PreviewAny", "inputs": {"source": [key, 1]}}
        model = key
    nodes["7"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": [model, 0], "positive": ["2", 0], "negative": ["3", 0],
            "latent_image": ["5", 0], "seed": 7, "steps": 2, "cfg": 3.0,
            "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        },
    }  # fmt: skip
    return nodes


def frames(server, prompt) -> np.ndarray:
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    return saved(server, result, "9")


def test_two_stacked_loras_equal_the_merged_file(server, files):
    fp8 = "side_fp8.safetensors"
    plain = frames(server, graph(files, fp8)).astype(int)
    stacked = frames(server, graph(files, fp8, (1, 0.9), (2, -0.6))).astype(int)
    merged = frames(server, graph(files, "side_merged.safetensors")).astype(int)
    assert stacked.shape == (5, 64, 64, 3) and stacked.std() > 10
    assert np.abs(stacked - merged).max() <= 1
    assert np.abs(plain - merged).mean() > 1
    swapped = frames(server, graph(files, fp8, (2, -0.6), (1, 0.9))).astype(int)
    assert np.abs(swapped - merged).max() <= 1
    one = frames(server, graph(files, fp8, (1, 0.9))).astype(int)
    assert np.abs(one - merged).mean() > 1
    # Another strength, and none, on the model that is still loaded.
    half = frames(server, graph(files, fp8, (1, 0.45))).astype(int)
    assert np.abs(half - one).mean() > 0.5
    np.testing.assert_array_equal(frames(server, graph(files, fp8, (1, 0.0))), plain)
    np.testing.assert_array_equal(frames(server, graph(files, fp8)), plain)


def test_a_foreign_file_is_refused(server, files):
    result = server.run(graph(files, "side_fp8.safetensors", ("foreign", 1.0)))
    assert result.status == "error"
    assert any("1 keys and none that fits" in str(error) for error in result.errors)
