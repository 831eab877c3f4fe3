"""The demo's denoiser: CatVTON's arrangement at a hundredth of its size, and the arithmetic of its
training.

9 input channels [x_t (4), mask (1), masked picture (4)], person over garment on the height axis,
self-attention only: the cross-attention layers exist in the module but return their input, as in
CatVTON, and are left out of the file.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import UNet2DConditionModel

CHANNELS = (64, 128, 128)
HEADS = 4


class SkipAttention:
    """Attention processor that returns its input (the block then adds norm2(x) to x)."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def build() -> UNet2DConditionModel:
    net = UNet2DConditionModel(
        in_channels=9,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=HEADS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    net.set_attn_processor(
        {k: SkipAttention() if "attn2" in k else p for k, p in net.attn_processors.items()}
    )
    return net.to(memory_format=torch.channels_last)


def alphas_cumprod() -> torch.Tensor:
    """SD 1.5's schedule: beta from 0.00085 to 0.012, linear in its square root, 1000 steps."""
    return torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
    ).float()


def canvas(
    latents: torch.Tensor, mask: torch.Tensor, keep_garment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """latents [B, 3, 4, h, w] and mask [B, h, w] -> x0 [B, 4, 2h, w] and condition [B, 5, 2h, w].

    keep_garment [B] is 0 where the garment half of the condition is emptied (the negative side of
    CFG).
    """
    person, masked, garment = latents.unbind(1)
    x0 = torch.cat([person, garment], 2)
    hole = torch.cat([mask, torch.zeros_like(mask)], 1)[:, None]
    picture = torch.cat([masked, garment * keep_garment[:, None, None, None]], 2)
    return x0, torch.cat([hole, picture], 1)


@torch.no_grad()
def sample(net, condition: torch.Tensor, noise: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """Deterministic DDIM on the v-prediction net, for evaluation; returns x0 [B, 4, 2h, w]."""
    abar = alphas_cumprod()
    times = torch.linspace(999, 0, steps + 1).round().long()
    x, context = noise, torch.zeros(len(noise), 1, 8)
    for now, after in pairwise(times):
        a, s = abar[now].sqrt(), (1 - abar[now]).sqrt()
        v = net(torch.cat([x, condition], 1), now, context).sample
        x0, eps = a * x - s * v, s * x + a * v
        x = x0 if after == 0 else abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    return x
