"""Attention calls for tests, the formula row by row as their measure, and kernels with faults."""

from __future__ import annotations

import numpy as np
import torch

from frugal.kernels.attention.backends import TORCH, Backend


def tensors(B=2, H=4, Hkv=None, Lq=9, Lk=13, D=40, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, H, Lq, D), (B, Hkv or H, Lk, D), (B, Hkv or H, Lk, D)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def mask_of(kind, B=2, H=4, Lq=9, Lk=13):
    if kind == "none":
        return None
    shape = {"2": (Lq, Lk), "3": (B, Lq, Lk), "4": (B, H, Lq, Lk)}[kind[-1]]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return noise > -0.3 if kind.startswith("bool") else 2 * noise


def by_rows(q, k, v, mask, scale):
    """Attention as the formula reads, one query row at a time, numpy float64."""
    q, k, v = (each.double().numpy() for each in (q, k, v))
    B, H, Lq, _ = q.shape
    out = np.zeros((B, H, Lq, v.shape[3]))
    if mask is not None:
        mask = mask.numpy() if mask.dtype == torch.bool else mask.double().numpy()
        mask = mask[(None,) * (2 if mask.ndim == 2 else 0)] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
        mask = np.broadcast_to(mask, (B, H, Lq, k.shape[2]))
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(Lq):
                s = np.array([scale * float(np.dot(q[b, h, i], key)) for key in k[b, g]])
                keep = np.ones(len(s), bool)
                if mask is not None and mask.dtype == bool:
                    keep = mask[b, h, i]
                elif mask is not None:
                    s = s + mask[b, h, i]
                if keep.any():
                    w = np.exp(s[keep] - s[keep].max())
                    out[b, h, i] = (w / w.sum()) @ v[b, g][keep]
    return torch.from_numpy(out)


def off(found, want):
    return float((found.double() - want).norm() / want.norm())


def fake(name, change=lambda out: out, spoil=None, **options):
    """A backend that is exact apart from what `change` does to its result, `spoil` to its keys."""

    def run(q, k, v, mask, scale):
        run.calls += 1
        out = TORCH.run(q, k, v, mask, scale)
        if spoil is not None:
            spoil(k)
        return change(out)

    run.calls = 0
    return Backend(name, run, devices=(), dtypes=(), multiple=1, **options)
