"""Convolutions of 16-bit floats with float32 sums, as CUDA takes them.

A CPU without instructions for 16 bits has slow kernels for them, which took minutes of a try-on.
"""

from __future__ import annotations

import torch

HALVES = (torch.float16, torch.bfloat16)
_library = torch.library.Library("aten", "IMPL")


def convolution(x, weight, bias, stride, padding, dilation, transposed, out_padding, groups):
    rest = (stride, padding, dilation, transposed, out_padding, groups)
    # benchmark, deterministic, cudnn, TF32: none of it is the CPU's.
    flags = (False, False, False, False)
    if x.dtype not in HALVES:
        return torch.ops.aten._convolution(x, weight, bias, *rest, *flags)
    if {weight.dtype, x.dtype if bias is None else bias.dtype} != {x.dtype}:
        raise RuntimeError(f"Input type {x.dtype} and weight or bias type differ [simulated]")
    wide = x.float(), weight.float(), None if bias is None else bias.float()
    return torch.ops.aten._convolution(*wide, *rest, *flags).to(x.dtype)


def install(device: str) -> None:
    """device: CUDA, or CPU for what the card is compared with."""
    _library.impl("convolution", convolution, device)
