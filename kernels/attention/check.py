"""Is a kernel's result attention, and did it leave its inputs alone?

A kernel is judged on 256 query rows spread over the sequence, in up to 32 heads spread over batch
and heads, against float32 (float64 for float64). The measure is the relative L2 error of the worst
of these heads.
"""

from __future__ import annotations

import math

import torch

from .eager import reference

ROWS, HEADS = 256, 32
LOSSY_LIMIT = 3e-2
# float32 leaves room for TF32, which some kernels use: 10 bits of mantissa.
LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3}
HALF_LIMIT = 1e-2


def limit(dtype: torch.dtype, exact: bool) -> float:
    """Largest relative L2 error that a kernel may have."""
    return LIMITS.get(dtype, HALF_LIMIT) if exact else LOSSY_LIMIT


def fingerprint(*tensors: torch.Tensor) -> list[int]:
    """Changes when a number of a tensor [B, H, L, D] changes; reads the bits, so that NaN counts as
    well.
    """
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # Head by head: PyTorch sums a copy in 64 bits, four times a whole tensor of 16.
    return [
        int(sum(head.view(same_size[each.element_size()]).sum(dtype=torch.int64)
                for picture in each for head in picture))
        for each in tensors
    ]  # fmt: skip


def error(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> float:
    """Relative L2 error of out (B, H, Lq, Dv) in its worst sampled head; inf where a number is NaN
    or infinite and the reference is not. mask has four axes.
    """
    batch, heads, q_len, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = _spread(q_len, ROWS).to(q.device)
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, k.shape[2])
    worst = 0.0
    for place in _spread(batch * heads, HEADS).tolist():
        b, h = divmod(place, heads)
        kv = h * k.shape[1] // heads
        part = None if mask is None else mask[b, h].index_select(0, rows)
        want = reference(q[b, h, rows], k[b, kv], v[b, kv], part, scale, exact)
        found = out[b, h, rows].to(exact)
        good = want.isfinite()
        size = torch.where(good, want, 0).norm()
        off = torch.where(good, found - want, 0).norm() / size.clamp_min(1e-30)
        value = float(off)
        worst = max(worst, value if math.isfinite(value) else math.inf)
    return worst


def complaint(
    out: object,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    exact: bool,
) -> str | None:
    """What is wrong with a kernel's result, or None."""
    if not isinstance(out, torch.Tensor):
        return f"gave a {type(out).__name__} instead of a tensor"
    shape = (*q.shape[:3], v.shape[3])
    if out.shape != shape:
        return f"gave shape {tuple(out.shape)} instead of {tuple(shape)}"
    if out.dtype != q.dtype or out.device != q.device:
        return f"gave {out.dtype} on {out.device} instead of {q.dtype} on {q.device}"
    off, most = error(out, q, k, v, mask, scale), limit(q.dtype, exact)
    if math.isinf(off):
        return "gave NaN or infinite numbers"
    if off > most:
        return f"is off by {off:.2g} (relative L2, at most {most:g})"
    return None


def _spread(length: int, most: int) -> torch.Tensor:
    """At most `most` different indices over 0 .. length - 1, both ends included."""
    if length <= most:
        return torch.arange(length)
    return torch.linspace(0, length - 1, most).round().long()
