"""Attention kernels of other packages, each behind one custom operator of ours.

The operator keeps torch.compile from looking inside, so that a package's own Python does not break
the graph; its stand-in for tracing gives the shape alone. A package is imported by its first call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .torch_sdpa import Run

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"


def opaque(name: str, kernel: Run) -> Run:
    """`kernel` as the operator frugal::attention_<name>.

    kernel: (q, k, v, mask, scale) -> (B, Lq, H, Dv) from q (B, H, Lq, D), k and v (B, Hkv, Lk,
    ...). What is returned gives (B, H, Lq, Dv), a view on it: the models want tokens before heads,
    so no copy is needed.
    """

    def run(q, k, v, mask, scale):
        return kernel(q, k, v, mask, scale).contiguous()

    def shape_only(q, k, v, mask, scale):
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

    operator = torch.library.custom_op(
        f"frugal::attention_{name.replace('-', '_')}", run, mutates_args=(), schema=SCHEMA
    )
    operator.register_fake(shape_only)

    def call(q, k, v, mask, scale):
        return operator(q, k, v, mask, scale).transpose(1, 2)

    return call


def tokens_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(B, H, L, D) -> (B, L, H, D), the last axis dense, as most packages want it."""
    moved = (tensor.transpose(1, 2) for tensor in tensors)
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in moved]


def flash(load: Callable[[], Callable[..., Any]]) -> Run:
    """FlashAttention 2, 3 and 4 share one signature; some versions also give the log-sum-exp."""

    def run(q, k, v, mask, scale):
        out = load()(*tokens_first(q, k, v), softmax_scale=scale, causal=False)
        return out[0] if isinstance(out, tuple) else out

    return run


def _flash_2():
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _flash_3():
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _flash_4():
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func


def _sage(q, k, v, mask, scale):
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    moved, more = k, {}
    # Version 1 subtracts the mean of the keys in place, which would spoil the caller's tensor. A
    # shift that all keys share changes no weight, so it is done here, on a copy. Version 2 takes no
    # such wish and does it itself, on the way to 8 bits.
    if "smooth_k" in inspect.signature(sageattn).parameters:
        moved, more = k - k.mean(dim=2, keepdim=True), {"smooth_k": False}
    q, moved, v = tokens_first(q, moved, v)
    return sageattn(q, moved, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, **more)


def _xformers(q, k, v, mask, scale):
    import xformers.ops  # pyright: ignore[reportMissingImports]

    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        # Its kernels read whole groups of eight numbers per row of the mask.
        odd = -k.shape[2] % 8
        mask = torch.nn.functional.pad(mask, (0, odd))[..., : k.shape[2]]
    return xformers.ops.memory_efficient_attention(
        *tokens_first(q, k, v), attn_bias=mask, scale=scale
    )


def _kitchen_int8(q, k, v, mask, scale):
    import comfy_kitchen

    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    return comfy_kitchen.int8_attention(q, k, v, scale=scale, attn_mask=mask).transpose(1, 2)


def kitchen_missing() -> str | None:
    """Why comfy-kitchen's int8 attention cannot run on the current device, or None."""
    try:
        from comfy_kitchen import int8_attention_is_available, list_backends
    except ImportError:
        return "is not part of this comfy-kitchen"
    # It calls the compiled kernels without asking whether the host program has switched them off,
    # as ComfyUI does where torch is built for a CUDA before 13.
    if list_backends().get("cuda", {}).get("disabled"):
        return "is off, as are all of comfy-kitchen's compiled kernels here"
    return (
        None if int8_attention_is_available() else "is not for this device, as comfy-kitchen says"
    )


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q, k, v, mask, scale):
    grouped = q.shape[1] != k.shape[1]
    return _compiled_flex()(q, k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)


flash_2 = opaque("flash-attn-2", flash(_flash_2))
flash_3 = opaque("flash-attn-3", flash(_flash_3))
flash_4 = opaque("flash-attn-4", flash(_flash_4))
sage = opaque("sage", _sage)
xformers = opaque("xformers", _xformers)
kitchen_int8 = opaque("kitchen-int8", _kitchen_int8)
flex = opaque("flex", _flex)
