"""A LoRA on a quantised Wan model, through ComfyUI's own loader node on a real server."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal.demo.tiny_wan import build_demo_wan

pytestmark = pytest.mark.comfy
_spec = importlib.util.spec_from_file_location(
    "wan_chain", Path(__file__).with_name("test_wan_chain.py")
)
assert _spec and _spec.loader
chain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chain)


@pytest.fixture(scope="module")
def files(server):
    made = build_demo_wan(server.models)
    state, make = load_file(made["t2v"]), torch.Generator().manual_seed(2)
    lora = {}
    for key, weight in state.items():
        if "blocks." in key and key.endswith(".weight") and weight.dim() == 2:
            rows, width = weight.shape
            size = float(weight.float().std()) * 0.6
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            lora[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=make) * size / 2
            lora[f"{layer}.lora_A.weight"] = torch.randn(4, width, generator=make)
    (server.models / "loras").mkdir(exist_ok=True)
    save_file(lora, server.models / "loras" / "wan_test_lora.safetensors")
    server.object_info(fresh=True)
    return {key: path.name for key, path in made.items()}


def clip(server, files, quantize: str, strength: float | None) -> np.ndarray:
    loader = chain.frugal_loader(files, "t2v")
    loader["inputs"] |= {"quantize": quantize, "matmul": "full precision"}
    nodes = chain.graph(loader, files, None)
    if strength is not None:
        lora = {"model": ["1", 0], "lora_name": "wan_test_lora.safetensors"}
        nodes["20"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {**lora, "strength_model": strength},
        }
        nodes["5"]["inputs"]["model"] = ["20", 0]
    return chain.frames(server, nodes).astype(float)


def test_lora_on_a_quantised_model(server, files):
    plain = clip(server, files, "fp8 per-channel", None)
    with_lora = clip(server, files, "fp8 per-channel", 1.0)
    again = clip(server, files, "fp8 per-channel", None)
    unquantised = clip(server, files, "as stored", 1.0)
    effect = np.abs(with_lora - plain).mean()
    # The LoRA acts as it does on the unquantised model, and leaves nothing behind.
    assert effect > 2
    assert np.abs(with_lora - unquantised).mean() < 0.5 * effect
    np.testing.assert_array_equal(again, plain)
