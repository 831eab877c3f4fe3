"""Wan blocks that work through the tokens in pieces, as object patches of a MODEL.

Feed-forward and cross-attention keep ComfyUI's own code and get it a piece at a time. The
self-attention is computed here, since queries and keys exist only inside it; whoever patches it
themselves gets ComfyUI's back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model
import torch

from ...kernels.memory.chunks import in_pieces
from ...kernels.memory.plan import MemoryOptions
from .._comfy import CAUSAL_RUN_KEY

GROUPS = ("blocks", "vace_blocks")
WHOLE = "frugal_whole"
PARTS = ("ffn", "cross_attn", "self_attn")
Forward = Callable[..., torch.Tensor]


@dataclass
class ActiveOptions:
    """The memory options that a MODEL's patches follow, and those to return to after a run."""

    planned: MemoryOptions
    now: MemoryOptions

    @classmethod
    def of(cls, memory_options: MemoryOptions) -> ActiveOptions:
        return cls(memory_options, memory_options)


def forwards(model: Any, state: ActiveOptions, original: Callable[[str], Forward]) -> Iterator:
    """(path below `model`, forward in pieces) of every part of every Wan block in `model`.

    original: path -> the forward that the pieces go through.
    """
    for group in GROUPS:
        for index, block in enumerate(getattr(model, group, ())):
            for part in PARTS:
                path = f"{group}.{index}.{part}.forward"
                # A plan on a planned MODEL takes the place of the first one.
                whole = original(path)
                whole = getattr(whole, WHOLE, whole)
                if part != "self_attn":
                    forward = _rowwise(whole, state)
                # Kinds of Wan with another self-attention keep theirs.
                elif type(block.self_attn) is comfy.ldm.wan.model.WanSelfAttention:
                    forward = _self_attention(block.self_attn, whole, state)
                else:
                    continue
                setattr(forward, WHOLE, whole)
                yield path, forward


def _rowwise(whole: Forward, state: ActiveOptions) -> Forward:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return in_pieces(lambda part, _: whole(part, *args, **kwargs), x, state.now.pieces)

    return forward


def _self_attention(attention: Any, whole: Forward, state: ActiveOptions) -> Forward:
    def forward(
        x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict[str, Any] | None = None
    ) -> torch.Tensor:
        options = transformer_options or {}
        pieces = state.now.attention
        # These patches get queries and keys of all tokens, as ComfyUI's own code has them.
        patched = "attn1_patch" in options.get("patches", {})
        # A causal run keeps keys and values of all heads of a layer together.
        whole_only = patched or CAUSAL_RUN_KEY in options
        if pieces <= 1 or whole_only or freqs.shape[1] != x.shape[1]:
            return whole(x, freqs, transformer_options=options)
        return _by_heads(attention, x, freqs, options, pieces)

    return forward


def _by_heads(
    attention: Any, x: torch.Tensor, freqs: torch.Tensor, options: dict[str, Any], pieces: int
) -> torch.Tensor:
    """Self-attention whose result takes the place of its queries, one group of heads at a time."""
    heads, width = attention.num_heads, attention.head_dim

    def rotated(linear: Any, norm: Any) -> torch.Tensor:
        def rowwise(part: torch.Tensor, here: slice) -> torch.Tensor:
            shaped = norm(linear(part)).view(*part.shape[:2], heads, width)
            return comfy.ldm.wan.model.apply_rope1(shaped, freqs[:, here]).flatten(2)

        return in_pieces(rowwise, x, pieces)

    q = rotated(attention.q, attention.norm_q)
    k = rotated(attention.k, attention.norm_k)
    v = in_pieces(lambda part, _: attention.v(part), x, pieces)
    group = heads // math.gcd(heads, pieces)
    for start in range(0, heads, group):
        here = slice(start * width, (start + group) * width)
        q[..., here] = comfy.ldm.wan.model.optimized_attention(
            q[..., here], k[..., here], v[..., here], heads=group, transformer_options=options
        )
    del k, v
    return in_pieces(lambda part, _: attention.o(part), q, pieces)
