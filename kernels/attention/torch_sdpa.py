"""PyTorch's scaled_dot_product_attention, as it chooses by itself and with one kernel forced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.attention
import torch.nn.functional as F

Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", float], torch.Tensor
]


def own_choice(q, k, v, mask, scale):
    """(B, H, Lq, Dv): whatever PyTorch takes for these shapes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def upcast(q, k, v, mask, scale):
    """The same computed in float32: CPUs without 16-bit matrix units are faster that way."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    return own_choice(q.float(), k.float(), v.float(), mask, scale).to(q.dtype)


def forced(kernel: str) -> Run:
    """Attention by the one kernel that `torch.nn.attention.SDPBackend` calls `kernel`; PyTorch
    raises RuntimeError where it cannot serve the call. The switch is undone after every call.
    """
    chosen = getattr(torch.nn.attention.SDPBackend, kernel)

    def run(q, k, v, mask, scale):
        with torch.nn.attention.sdpa_kernel(chosen):
            return own_choice(q, k, v, mask, scale)

    return run


@contextlib.contextmanager
def flash_implementation(name: str) -> Iterator[None]:
    """PyTorch's flash kernel is `name` ("FA3", "FA4") inside, and what it was before outside.

    Raises RuntimeError where this PyTorch has no such switch, ValueError or ImportError where it
    does not know the name or the kernels are not installed.
    """
    attention = torch.nn.attention
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise RuntimeError(f"PyTorch {torch.__version__} cannot switch its flash kernel")
    before = attention.current_flash_attention_impl()
    try:
        activate(name)
        yield
    finally:
        if before is not None:
            activate(before)
        elif attention.current_flash_attention_impl() is not None:
            attention.restore_flash_attention_impl()


def switched(name: str) -> Run:
    """Attention by PyTorch's flash kernel after `flash_implementation(name)`."""
    flash = forced("FLASH_ATTENTION")

    def run(q, k, v, mask, scale):
        with flash_implementation(name):
            return flash(q, k, v, mask, scale)

    return run
