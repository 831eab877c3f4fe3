"""The demo's picture codec, in the layout of TAESD (tiny autoencoder for Stable Diffusion; factor
8, 4 channels).

That layout is the small one that ComfyUI's own `VAELoader` reads, so the demo needs no loader of
its own. It has no normalisation layers; with pictures in 0..1 every ReLU passes them unchanged,
which allows the start below: an exact 8x8 block mean on the way in, its inverse on the way out.
Training then only has to add the detail.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 64
SD_SCALE = (
    0.18215  # SD 1.5's latent factor: the file divides by it, ComfyUI's latent format multiplies
)


def conv(inputs: int, outputs: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class Block(nn.Module):
    """Three convolutions and an identity skip, ReLU after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)
        )
        nn.init.zeros_(self.conv[4].weight)
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Codec(nn.Module):
    """encode: pictures [B, 3, H, W] in 0..1 -> latents [B, 4, H/8, W/8] of about unit scale;
    decode: the reverse.
    """

    def __init__(self) -> None:
        super().__init__()
        down: list[nn.Module] = [conv(3, WIDTH), Block()]
        for _ in range(3):
            down += [conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]
        self.taesd_encoder = nn.Sequential(*down, conv(WIDTH, 4))
        up: list[nn.Module] = [SoftClamp(), conv(4, WIDTH), nn.ReLU()]
        for _ in range(3):
            up += [
                Block(),
                Block(),
                Block(),
                nn.Upsample(scale_factor=2),
                conv(WIDTH, WIDTH, bias=False),
            ]
        self.taesd_decoder = nn.Sequential(*up, Block(), conv(WIDTH, 3))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.taesd_encoder(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.taesd_decoder(z)

    def export(self) -> dict[str, torch.Tensor]:
        """State dict for `models/vae`: fp16, with the scale and shift that ComfyUI reads."""
        state = {k: v.detach().half().contiguous() for k, v in self.state_dict().items()}
        return state | {"vae_scale": torch.tensor(SD_SCALE), "vae_shift": torch.tensor(0.0)}


@torch.no_grad()
def start_from_block_means(codec: Codec, colors: torch.Tensor) -> None:
    """Set channels 0..2 to the block-mean path; `colors` [N, 3] in 0..1 are sampled block means.

    The three colour latents are whitened (mean 0, variance 1, uncorrelated), because a diffusion
    model learns fastest on latents of unit scale; the fourth stays free for detail.
    """
    mean = colors.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(colors.T))
    whiten = vectors.T / values.sqrt()[:, None]
    encoder, decoder = codec.taesd_encoder, codec.taesd_decoder
    for layer in [*encoder, *decoder]:
        if isinstance(layer, nn.Conv2d):
            layer.weight[:3] = 0
            if layer.bias is not None:
                layer.bias[:3] = 0
    for layer in encoder:
        if isinstance(layer, nn.Conv2d) and layer.out_channels == WIDTH:
            taps = [1, 2] if layer.stride == (2, 2) else [1]
            for c in range(3):
                for i in taps:
                    for j in taps:
                        layer.weight[c, c, i, j] = 1 / len(taps) ** 2
    encoder[-1].weight[:3, :3, 1, 1] = whiten
    encoder[-1].bias[:3] = -whiten @ mean
    color = torch.linalg.inv(whiten)
    decoder[1].weight[:3, :3, 1, 1] = color
    decoder[1].bias[:3] = mean
    for layer in decoder[2:]:
        if isinstance(layer, nn.Conv2d):
            for c in range(3):
                layer.weight[c, c, 1, 1] = 1
