"""Attention in plain tensor operations: the reference, and a form that needs little memory.

softmax(Q K^T * scale + M) V (Vaswani et al., arXiv 1706.03762). A row whose keys are all masked
gives zero, as PyTorch's own attention does.
"""

from __future__ import annotations

import torch

# Scores held at once, in bytes: large enough for full speed on a CPU, small beside one activation.
SCORE_BYTES = 64 * 2**20


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(..., Lq, Dv) in `dtype`, computed in it throughout; q (..., Lq, D), k (..., Lk, D), v (...,
    Lk, Dv); mask bool or additive, broadcastable to (..., Lq, Lk).
    """
    scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.to(dtype)
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top.isinf(), torch.zeros_like(top), top))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights @ v.to(dtype)) / torch.where(total == 0, torch.ones_like(total), total)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """(B, H, Lq, Dv) in q's dtype, head by head and in runs of query rows that hold at most
    SCORE_BYTES of scores; float64 stays float64, everything else is computed in float32.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = max(1, SCORE_BYTES // (k_len * exact.itemsize))
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, k_len)
    out = q.new_empty(batch, heads, q_len, v.shape[3])
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].to(exact), v[b, h].to(exact)
            for start in range(0, q_len, rows):
                here = slice(start, start + rows)
                part = None if mask is None else mask[b, h, here]
                out[b, h, here] = reference(q[b, h, here], keys, values, part, scale, exact)
    return out
