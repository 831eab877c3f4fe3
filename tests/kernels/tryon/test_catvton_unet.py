"""Structure of a diffusers UNet from its shapes, against diffusers' own configuration."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from frugal.kernels.checkpoints import catvton
from frugal.kernels.errors import FrugalError

SD15 = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    cross_attention_dim=768,
)
TINY = dict(
    block_out_channels=(64, 128, 192),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=8,
)


def shapes(options):
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=9, out_channels=4, attention_head_dim=4, **options)
    return {name: tuple(t.shape) for name, t in unet.state_dict().items()}


def test_the_full_model():
    assert catvton.unet_config(shapes(SD15), "x") == {
        "in_channels": 9,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    }


def test_the_small_model():
    assert catvton.unet_config(shapes(TINY), "x") == {
        "in_channels": 9,
        "model_channels": 64,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 3],
        "transformer_depth": [0, 1, 1],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    }


@pytest.mark.parametrize(
    "cut, match",
    [
        ("up_blocks.2.", "unequal numbers"),
        ("down_blocks.1.", "gaps"),
        ("mid_block.attentions.0.", "middle block"),
        ("up_blocks.0.resnets.1.", "1 residual blocks in up block 0"),
    ],
)
def test_an_incomplete_model_is_refused(cut, match):
    left = {name: shape for name, shape in shapes(TINY).items() if not name.startswith(cut)}
    with pytest.raises(FrugalError, match=match):
        catvton.unet_config(left, "x")
