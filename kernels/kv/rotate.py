"""Moving a cached key to another place in time.

Wan turns pair i of the first `axis` dimensions of a head by t * theta**(-2 i / axis) (RoPE,
arXiv 2104.09864, over time; the other dimensions turn with height and width). Turns add, so a key
kept at time t belongs at t + shift after one more turn by shift.
"""

from __future__ import annotations

import torch

THETA = 10000.0


def time_axis(width: int) -> int:
    """Dimensions of a head of `width` that carry time in Wan."""
    return width - 4 * (width // 6)


def shifted(k: torch.Tensor, shift: float) -> torch.Tensor:
    """k [..., width] moved by `shift` latent frames; computed in float32, returned in k's dtype.
    The same tensor if shift is 0.
    """
    if not shift:
        return k
    axis = time_axis(k.shape[-1])
    steps = torch.arange(0, axis, 2, dtype=torch.float64, device=k.device)
    angle = shift * THETA ** (-steps / axis)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = k[..., :axis].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return torch.cat((turned.flatten(-2).to(k.dtype), k[..., axis:]), dim=-1)
