"""The shape tables of the tiny Wan files say what the ComfyUI under test builds."""

from __future__ import annotations

import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ops
import pytest
import torch

from frugal.demo.tiny_wan import I2V, T2V, WanSize, build_demo_wan, vae_shapes, wan_shapes


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("size", [T2V, I2V, WanSize(dim=384, ffn=640, layers=3, in_dim=48)])
def test_model_table(size):
    model = comfy.ldm.wan.model.WanModel(
        model_type="i2v" if size.image_to_video else "t2v",
        in_dim=size.in_dim,
        dim=size.dim,
        ffn_dim=size.ffn,
        num_heads=size.dim // 128,
        num_layers=size.layers,
        operations=comfy.ops.disable_weight_init,
        device="meta",
        dtype=torch.float16,
    )
    assert shapes_of(model) == wan_shapes(size)


@pytest.mark.parametrize("dim", [8, 96])
def test_vae_table(dim):
    with torch.device("meta"):
        vae = comfy.ldm.wan.vae.WanVAE(
            dim=dim,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
        )
    assert shapes_of(vae) == vae_shapes(dim)


def test_same_bytes_every_time(tmp_path):
    first = build_demo_wan(tmp_path / "a")
    second = build_demo_wan(tmp_path / "b")
    assert len(first) == 5
    for key, path in first.items():
        assert path.read_bytes() == second[key].read_bytes(), key
    assert not list(tmp_path.rglob("*.part"))
