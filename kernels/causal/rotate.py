"""Moving a cached key to another place in time.

Wan turns pair i of the first `axis` dimensions of a head by t * theta**(-2 i / axis) (RoPE,
arXiv 2104.09864, over time; the other dimensions turn with height and width). Turns add, so a key
kept at time t belongs at t + shift after one more turn by shift.
"""

from __future__ import annotations

import functools

import torch

THETA = 10000.0
# Turns that are kept, each a few hundred numbers: the frames of a window stand at as many places.
TURNS = 256


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
    cos, sin = _turn(axis, shift, k.device)
    first, second = k[..., :axis].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return torch.cat((turned.flatten(-2).to(k.dtype), k[..., axis:]), dim=-1)


@functools.lru_cache(TURNS)
def _turn(axis: int, shift: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [axis / 2]. Computed in float64, which not every device has, and
    kept there: sending them makes the host wait.
    """
    with torch.inference_mode(False):
        steps = torch.arange(0, axis, 2, dtype=torch.float64)
        angle = shift * THETA ** (-steps / axis)
        return angle.cos().float().to(device), angle.sin().float().to(device)
