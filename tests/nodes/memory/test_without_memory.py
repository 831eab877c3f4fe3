"""Modules without memory where ComfyUI has dynamic VRAM on, and where models have run."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import comfy.ldm.wan.model
import comfy.sd
import pytest
import torch

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.memory.plan import MemoryOptions
from frugal.nodes.memory import meta_models, without_memory

VARIANTS = {
    "t2v": dict(model_type="t2v", in_dim=16),
    "i2v": dict(model_type="i2v", in_dim=36),
    "vace": dict(model_type="vace", in_dim=16, vace_layers=2, vace_in_dim=96),
}


@pytest.fixture
def dynamic(monkeypatch):
    """ComfyUI's layers as they are with dynamic VRAM."""
    memory = pytest.importorskip("comfy.memory_management")
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    monkeypatch.setattr(memory, "aimdo_enabled", True)


def peaks_of(variant):
    config = dict(
        image_model="wan2.1", dim=128, ffn_dim=256, num_heads=2, num_layers=4, out_dim=16,
        **VARIANTS[variant],
    )  # fmt: skip
    kind = comfy.ldm.wan.model
    network = (kind.VaceWanModel if variant == "vace" else kind.WanModel)(
        **config, device="meta", operations=meta_models.MetaOps
    )
    model = SimpleNamespace(
        model_config=SimpleNamespace(unet_config=config),
        manual_cast_dtype=torch.bfloat16,
        diffusion_model=network,
    )
    return meta_models.ForwardPeaks(model, torch.device("cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trace_needs_no_file_under_dynamic_vram(variant, monkeypatch, request):
    shape = 2, (2, 8, 8), MemoryOptions(True, 2, 2)
    static = peaks_of(variant).of(*shape)
    request.getfixturevalue("dynamic")
    assert peaks_of(variant).of(*shape) == static > 0


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_every_layer_has_its_weight(kind, dynamic):
    layer = getattr(without_memory.MetaOps, kind)(4, 6, device="meta", dtype=torch.bfloat16)
    shape = (6, 4) if kind == "Linear" else (4, 6)
    assert layer.weight.shape == shape and layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16
    layer.load_state_dict(layer.state_dict(), assign=True)


FREED: list[int] = []


class Handle:
    """What a native handle does: the memory goes with it, whoever made it."""

    def __init__(self):
        self.pointer = id(self)

    def __del__(self):
        FREED.append(self.pointer)


def test_a_copy_frees_nothing_of_the_original():
    vae = comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=torch.float32)
    model = vae.first_stage_model
    plain = meta_models.decoded(vae, (2, 8, 8))
    handles, calls = [Handle(), Handle()], []
    for module in model.modules():
        module._v = (handles[0], 4096, 512)
        module._pin_state = {"weights": (handles[1], [], [0]), "active": True}
        module._pins = {"weights": {"pin": torch.zeros(4)}}
        module.weight_lowvram_function = SimpleNamespace(_pin_state=module._pin_state)
    model.decoder.register_forward_hook(lambda *_: calls.append("original"))
    FREED.clear()
    light = meta_models.light_vae(model)
    for module in light.modules():
        assert not {"_v", "_pin_state", "_pins", "weight_lowvram_function"} & vars(module).keys()
        module.register_forward_hook(lambda *_: calls.append("copy"))
    meta_models.decode_peak(light, 16, (2, 8, 8), torch.float32)
    assert "copy" in calls
    del light, module
    assert meta_models.decoded(vae, (2, 8, 8)) == plain
    gc.collect()
    assert not FREED
    calls.clear()
    assert vae.decode(torch.zeros(1, 16, 1, 8, 8)).isfinite().all()
    assert set(calls) == {"original"}


def test_weights_count_in_the_type_they_compute_in():
    """With dynamic VRAM a weight keeps the file's type until it is loaded."""
    conv = torch.nn.Conv2d(4, 4, 3)
    conv.weight_comfy_model_dtype = torch.bfloat16
    pair = torch.nn.Sequential(conv, conv, torch.nn.BatchNorm2d(4))
    light = without_memory.without_memory(pair)
    assert light[0] is light[1] is not conv
    assert light[0].weight.dtype == torch.bfloat16 and light[0].bias.dtype == torch.float32
    assert all(each.is_meta for each in (*light.parameters(), *light.buffers()))
    assert pair.state_dict().keys() == light.state_dict().keys()
    assert not any(each.is_meta for each in pair.parameters())
