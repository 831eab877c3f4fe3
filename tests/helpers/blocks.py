"""fp8 weights with one scale per block, made element by element."""

from __future__ import annotations

import torch


def fp8_runs(weight: torch.Tensor, dtype: torch.dtype, run: int):
    """One scale per row and `run` inputs: (float8 [out, in], float32 scale [out, in / run, 1],
    dequantised float32).
    """
    out = [
        _scaled(weight[:, start : start + run], dtype, rows=True)
        for start in range(0, weight.shape[1], run)
    ]
    stored, scales, exact = (torch.cat([part[i] for part in out], dim=1) for i in range(3))
    return stored, scales[:, :, None], exact


def fp8_squares(weight: torch.Tensor, dtype: torch.dtype, side: int = 128):
    """One scale per square of 128: (float8 [out, in], float32 scale [rows, columns], dequantised
    float32).
    """
    lines = []
    for top in range(0, weight.shape[0], side):
        line = [
            _scaled(weight[top : top + side, left : left + side], dtype, rows=False)
            for left in range(0, weight.shape[1], side)
        ]
        lines.append([torch.cat([part[i] for part in line], dim=1) for i in range(3)])
    stored, scales, exact = (torch.cat([line[i] for line in lines]) for i in range(3))
    return stored, scales, exact


def _scaled(block: torch.Tensor, dtype: torch.dtype, rows: bool):
    top = block.abs().amax(dim=1, keepdim=True) if rows else block.abs().amax().reshape(1, 1)
    scale = (top / torch.finfo(dtype).max).float()
    stored = (block / scale).to(dtype)
    return stored, scale, stored.float() * scale
