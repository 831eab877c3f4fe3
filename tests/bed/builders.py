"""Tiny seeded model files for tests: small enough for a CPU, laid out like the real ones.

Wan files come from the shape tables in demo/tiny_wan.py, which need no ComfyUI; the try-on UNet
from diffusers, whose naming it keeps. Every function writes safetensors and returns the path.
"""

from __future__ import annotations

from pathlib import Path

import torch

from frugal.demo.tiny_wan import (
    CLIP_TOKENS,
    CLIP_WIDTH,
    I2V,
    T2V,
    WanSize,
    fill,
    save,
    text_embedding,
    vae_shapes,
    wan_shapes,
)

TRYON_CHANNELS = (64, 128, 192)


def wan_model(
    path: Path, size: WanSize = T2V, seed: int = 0, dtype: torch.dtype = torch.float16
) -> Path:
    """A Wan 2.1 diffusion model in canonical keys, without metadata."""
    return save(fill(wan_shapes(size), seed, dtype), path)


def wan_i2v(path: Path, seed: int = 0) -> Path:
    return wan_model(path, I2V, seed)


def wan_vae(path: Path, dim: int = 8, seed: int = 0) -> Path:
    return save(fill(vae_shapes(dim), seed), path)


def text_embeds(path: Path, tokens: int = 12, seed: int = 0) -> Path:
    """One float32 tensor [1, tokens, 4096], the shape the umT5 encoder gives."""
    return save({"embeds": text_embedding(tokens, seed)}, path)


def clip_vision_embeds(path: Path, seed: int = 0) -> Path:
    """One float32 tensor [1, 257, 1280], ViT-H's penultimate hidden states."""
    noise = torch.randn(1, CLIP_TOKENS, CLIP_WIDTH, generator=torch.Generator().manual_seed(seed))
    return save({"penultimate_hidden_states": noise}, path)


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
