"""Attention over pages that lie apart, exactly: gathered into one tensor, or in chunks.

In chunks, each part gives its output and the log of its sum of exponentials (lse), and
out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i) is softmax attention over all of
them (online softmax, Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..attention.backends import NAMED
from ..attention.call import capability_of

if TYPE_CHECKING:
    from .cache import VideoCache

GATHERED, CHUNKED, PAGED = "gathered", "chunked", "paged"
FLASH, EFFICIENT = "flash", "efficient"
CHUNK_FRAMES = 3  # frames brought together at a time when pages are attended in chunks


def with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(q k^T / sqrt(D)) v [B, H, Lq, D] in q's dtype, its lse float32 [B, H, Lq]).

    q [B, H, Lq, D], k and v [B, H, Lk, D], one floating dtype.
    """
    aten = torch.ops.aten
    # Without memory there is only the question what would be made: that of the fused kernels.
    if q.device.type in ("cpu", "meta"):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
        return out, lse.float()
    kernel = cuda_kernel(q.dtype, q.device) if q.device.type == "cuda" else ""
    if kernel == FLASH:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[:2]
        return out, lse.float()
    if kernel == EFFICIENT:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        # The rows of this lse are rounded up to a multiple of 32.
        return out, lse[..., : q.shape[2]].float()
    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), lse


def cuda_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """Which of PyTorch's fused kernels takes this type on this card, "" for none. On an RTX 2060
    that is not the flash kernel, and none for bfloat16.
    """
    capability = capability_of(device)
    for name, kernel in (("torch-flash", FLASH), ("torch-efficient", EFFICIENT)):
        backend = NAMED[name]
        if dtype in backend.dtypes and backend.refused_card(capability, dtype) is None:
            return kernel
    return ""


def merged(q: torch.Tensor, runs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """softmax attention of q [B, Lq, H, D] over the keys and values of all runs, each
    [B, L_i, H, D]; one at a time is in use. Returns [B, Lq, H, D] in q's dtype; sums in float32.
    """
    heads_first = q.transpose(1, 2)
    parts = (with_lse(heads_first, k.transpose(1, 2), v.transpose(1, 2)) for k, v in runs)
    return joined(parts).transpose(1, 2).to(q.dtype)


def joined(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over all of the parts, float32 [B, H, Lq, D], from the attention over each of them,
    (output [B, H, Lq, D], lse [B, H, Lq]).
    """
    total: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    for part, part_lse in parts:
        if total is None or lse is None:
            total, lse = part.float(), part_lse
            continue
        both = torch.logaddexp(lse, part_lse)
        total = total * (lse - both).exp().unsqueeze(-1)
        total += part.float() * (part_lse - both).exp().unsqueeze(-1)
        lse = both
    if total is None:
        raise ValueError("no run of keys and values")
    return total


def over_pages(
    cache: VideoCache,
    layer: int,
    streams: Sequence[int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    whole: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Self-attention of one layer of a block over the kept frames and itself, in the way that the
    cache is set to; the block's keys and values go into the cache if it is being written.

    q, k, v [len(streams) * B, frames * tokens, heads * D], also the result. whole: the attention
    over all keys at once, unused where pages are attended in chunks or through the block table.
    """
    split = (*k.shape[:2], heads, k.shape[-1] // heads)
    q4, k4, v4 = (each.view(split) for each in (q, k, v))
    cache.store(layer, streams, k4, v4)
    if cache.options.way == CHUNKED:
        parts = cache.runs(layer, streams, k4, v4, CHUNK_FRAMES)
        return merged(q4, parts).flatten(2)
    out = cache.attended_paged(layer, streams, q4, k4, v4)
    if out is not None:
        return out.flatten(2)
    if cache.kept:
        k, v = (each.flatten(2) for each in cache.gathered(layer, streams, k4, v4))
    return whole(q, k, v)
