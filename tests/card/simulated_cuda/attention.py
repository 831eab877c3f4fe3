"""Fused attention as CUDA has it: the same result, refusals and layout, computed by definition."""

from __future__ import annotations

import torch

from .torch_cuda import state

_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    _library.impl("_scaled_dot_product_flash_attention", flash, "CUDA")
    _library.impl("_scaled_dot_product_efficient_attention", efficient, "CUDA")


def exact(q, k, v, bias, scale):
    """q [B, H, Lq, D], k and v [B, H, Lk, D]: (out [B, H, Lq, D], lse [B, H, Lq])."""
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.float()
    # As the kernels leave it: heads behind tokens in memory.
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("Expected query, key and value to be half or bfloat16 [simulated]")
    if state.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer. [simulated]")
    out, lse = exact(q, k, v, None, scale)
    none = torch.empty(0, device=q.device)
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    return out, lse, none, none, q.shape[2], k.shape[2], seed, seed, none


def efficient(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    if q.dtype == torch.bfloat16 and state.capability < (8, 0):
        raise RuntimeError("bfloat16 needs compute capability 8.0 [simulated]")
    out, lse = exact(q, k, v, attn_bias, scale)
    rows = -(-lse.shape[-1] // 32) * 32
    lse = torch.nn.functional.pad(lse, (0, rows - lse.shape[-1]), value=float("inf"))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return out, lse, seed, seed
