"""What a device can do with number types. No list says it for Apple, Intel and DirectML devices,
and it changes with torch, so it is tried once on a few numbers.
"""

from __future__ import annotations

import functools

import torch

from .errors import FrugalError

SIDE = 32
# Kinds of device that have float64 for certain.
FLOAT64 = ("cpu", "cuda", "meta")
REFUSALS = (RuntimeError, TypeError, NotImplementedError, ValueError, AttributeError)


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return ascii(first)[1:-1][:120]


@functools.cache
def why_no_float8(device: torch.device) -> str:
    """Why fp8 tensors cannot lie on `device` and be converted there, "" if they can."""
    try:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            torch.ones(SIDE).to(dtype).to(device).to(torch.float16)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return _reason(error)
    return ""


@functools.cache
def why_no_int8_product(device: torch.device) -> str:
    """Why `device` does not multiply int8 matrices through PyTorch, "" if it does."""
    try:
        ones = torch.ones(SIDE, SIDE, dtype=torch.int8, device=device)
        found = torch.ops.aten._int_mm(ones, ones.t().contiguous())
        if found.device.type != "meta" and not bool((found == SIDE).all()):
            return "wrong results"
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return _reason(error)
    return ""


def need_float8(device: torch.device, what: str, do: str) -> None:
    """Raises FrugalError, with this remedy, where `what` takes fp8 and `device` has none."""
    why = why_no_float8(device)
    if why:
        raise FrugalError(
            f"{what}, and {device} has no 8-bit floats ({why})", "a device that has them", do
        )


@functools.cache
def wide(device: torch.device) -> torch.dtype:
    """float64, or float32 where `device` cannot add numbers of it: sums are as good as that makes
    them. What has to be exact is computed on the CPU.
    """
    if device.type in FLOAT64:
        return torch.float64
    try:
        # Some only fail when they have to compute.
        float(torch.ones(2, device=device).sum(dtype=torch.float64))
    except REFUSALS:
        return torch.float32
    return torch.float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In the widest type of its device."""
    return tensor.to(wide(tensor.device))
