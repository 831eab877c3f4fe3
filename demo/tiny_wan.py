"""Tiny random Wan 2.1 files with the real layout, built from shape tables alone.

The weights are seeded noise: whatever they paint is noise too. What they are good for is that a
real ComfyUI loads and samples them on a CPU in seconds, along the same code as the real files.
Layout: Wan 2.1 (arXiv 2503.20314) as released.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT_WIDTH, CLIP_WIDTH, TIME_WIDTH = 4096, 1280, 256
LATENT_CHANNELS, VAE_LEVELS, VAE_BLOCKS = 16, (1, 2, 4, 4), 2
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WanSize:
    """dim: width, at least 128 and a multiple of 128 (one head each). in_dim: 16 T2V, 36 I2V."""

    dim: int = 256
    ffn: int = 512
    layers: int = 2
    in_dim: int = 16
    image_to_video: bool = False


T2V = WanSize()
I2V = WanSize(in_dim=36, image_to_video=True)


def wan_shapes(size: WanSize = T2V) -> Shapes:
    """Canonical key -> shape of a Wan 2.1 diffusion model."""
    dim, shapes = size.dim, {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (width,)
        if bias:
            shapes[f"{name}.bias"] = (width,)

    shapes["patch_embedding.weight"] = (dim, size.in_dim, 1, 2, 2)
    shapes["patch_embedding.bias"] = (dim,)
    linear("text_embedding.0", dim, TEXT_WIDTH)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, TIME_WIDTH)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for layer in range(size.layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            image = size.image_to_video and attention == "cross_attn"
            for part in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
                linear(f"{block}.{attention}.{part}", dim, dim)
            for part in ("norm_q", "norm_k", *(("norm_k_img",) if image else ())):
                norm(f"{block}.{attention}.{part}", dim, bias=False)
        norm(f"{block}.norm3", dim)
        linear(f"{block}.ffn.0", size.ffn, dim)
        linear(f"{block}.ffn.2", dim, size.ffn)
    linear("head.head", LATENT_CHANNELS * 4, dim)
    shapes["head.modulation"] = (1, 2, dim)
    if size.image_to_video:
        norm("img_emb.proj.0", CLIP_WIDTH)
        linear("img_emb.proj.1", CLIP_WIDTH, CLIP_WIDTH)
        linear("img_emb.proj.3", dim, CLIP_WIDTH)
        norm("img_emb.proj.4", dim)
    return shapes


def vae_shapes(dim: int = 8) -> Shapes:
    """Canonical key -> shape of the Wan 2.1 VAE; the released one has dim 96."""
    shapes: Shapes = {}

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, *kernel)
        shapes[f"{name}.bias"] = (out,)

    def residual(name: str, into: int, out: int) -> None:
        shapes[f"{name}.residual.0.gamma"] = (into, 1, 1, 1)
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        shapes[f"{name}.residual.3.gamma"] = (out, 1, 1, 1)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def middle(side: str, width: int) -> None:
        residual(f"{side}.middle.0", width, width)
        shapes[f"{side}.middle.1.norm.gamma"] = (width, 1, 1)
        conv(f"{side}.middle.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{side}.middle.1.proj", width, width, 1, 1)
        residual(f"{side}.middle.2", width, width)

    def head(side: str, width: int, out: int) -> None:
        shapes[f"{side}.head.0.gamma"] = (width, 1, 1, 1)
        conv(f"{side}.head.2", out, width, 3, 3, 3)

    widths = [dim * level for level in VAE_LEVELS]
    conv("encoder.conv1", dim, 3, 3, 3, 3)
    place, into = 0, dim
    for level, out in enumerate(widths):
        for _ in range(VAE_BLOCKS):
            residual(f"encoder.downsamples.{place}", into, out)
            place, into = place + 1, out
        if level < 3:
            conv(f"encoder.downsamples.{place}.resample.1", out, out, 3, 3)
            if level > 0:
                conv(f"encoder.downsamples.{place}.time_conv", out, out, 3, 1, 1)
            place += 1
    middle("encoder", widths[-1])
    head("encoder", widths[-1], 2 * LATENT_CHANNELS)
    conv("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    conv("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)

    conv("decoder.conv1", widths[-1], LATENT_CHANNELS, 3, 3, 3)
    middle("decoder", widths[-1])
    place, into = 0, widths[-1]
    for level, out in enumerate(reversed(widths)):
        # Upsampling halves the channels, so each later level starts from half.
        into = into // 2 if level else into
        for _ in range(VAE_BLOCKS + 1):
            residual(f"decoder.upsamples.{place}", into, out)
            place, into = place + 1, out
        if level < 3:
            conv(f"decoder.upsamples.{place}.resample.1", out // 2, out, 3, 3)
            if level < 2:
                conv(f"decoder.upsamples.{place}.time_conv", 2 * out, out, 3, 1, 1)
            place += 1
    head("decoder", dim, 3)
    return shapes


def fill(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict:
    """Seeded weights: matrices N(0, 1/fan_in), biases 0.02 N, norms 1, modulation N/sqrt(dim).

    With these scales activations stay near unit size, so a wrong scale anywhere shows in the
    output.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("modulation"):
            value = noise / shape[-1] ** 0.5
        elif name.endswith(".bias"):
            value = 0.02 * noise
        elif name.endswith(".gamma") or len(shape) == 1:
            value = torch.ones(shape)
        else:
            value = noise / noise[0].numel() ** 0.5
        state[name] = value.to(dtype)
    return state


def text_embedding(tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """A stand-in for the text encoder's output: float32 [1, tokens, 4096], seeded noise."""
    return 0.1 * torch.randn(1, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def save(
    state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file; the name appears only once the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    save_file(state, str(unfinished), metadata)
    os.replace(unfinished, path)
    return path


def build_demo_wan(folder: Path | str) -> dict[str, Path]:
    """Write what a tiny image-to-video and text-to-video graph needs into a models folder.

    Returns what was written: i2v, t2v (diffusion_models/), vae (vae/), positive and negative
    (text_embeds/). The same bytes on every call.
    """
    folder = Path(folder)
    return {
        "i2v": save(
            fill(wan_shapes(I2V), 1),
            folder / "diffusion_models" / "wan_tiny_random_i2v.safetensors",
        ),
        "t2v": save(
            fill(wan_shapes(T2V), 2),
            folder / "diffusion_models" / "wan_tiny_random_t2v.safetensors",
        ),
        "vae": save(fill(vae_shapes(), 3), folder / "vae" / "wan_tiny_random_vae.safetensors"),
        "positive": save(
            {"embeds": text_embedding(seed=4)}, folder / "text_embeds" / "tiny_positive.safetensors"
        ),
        "negative": save(
            {"embeds": text_embedding(seed=5)}, folder / "text_embeds" / "tiny_negative.safetensors"
        ),
    }
