"""Tiny seeded try-on files for tests, laid out like the real ones.

The UNet comes from diffusers, whose naming it keeps. Wan files come from demo/tiny_wan.py. Every
function writes safetensors and returns the path.
"""

from __future__ import annotations

from pathlib import Path

import torch

from frugal.demo.tiny_wan import save

TRYON_CHANNELS = (64, 128, 192)


def tryon_unet(channels: tuple[int, ...] = TRYON_CHANNELS, in_channels: int = 9):
    """diffusers' UNet with the inpainting layout of SD 1.5 at a fraction of its width, unseeded."""
    from diffusers import UNet2DConditionModel

    down = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(channels) - 1)
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=8,
        # diffusers reads this as the number of heads, not their width.
        attention_head_dim=4,
    )


def tryon_model(path: Path, seed: int = 0, in_channels: int = 9) -> Path:
    """The UNet of `tryon_unet` in diffusers naming with its metadata (number of heads)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = tryon_unet(in_channels=in_channels).state_dict()
        # diffusers starts every norm at one, which would hide a norm that is skipped or swapped.
        for name, value in state.items():
            if "norm" in name and name.endswith("weight"):
                value.mul_(1 + 0.2 * torch.randn_like(value))
    tensors = {name: value.to(torch.float16).contiguous() for name, value in state.items()}
    return save(tensors, path, {"num_heads": "4"})


def tryon_vae(path: Path, seed: int = 0) -> Path:
    """A random picture codec that ComfyUI's own VAELoader reads (factor 8, 4 latent channels)."""
    from frugal.demo.codec import Codec

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return save(Codec().export(), path)
