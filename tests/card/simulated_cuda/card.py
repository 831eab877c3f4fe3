"""A simulated NVIDIA card for machines that have none: ComfyUI with dynamic VRAM runs on it.

    from frugal.tests.card.simulated_cuda import card        # before torch
    card.start(memory_gb=12, capability=(8, 6))

It fills the empty CUDA dispatch key of a CPU-only torch: tensors say `cuda:0`, their memory is host
memory. What it shows:

- tensors left on the CPU among device tensors, with the sentence that CUDA has for it;
- CUDA's own rules on shapes of `_int_mm` and `_scaled_mm`, and on types of fused attention;
- bytes allocated and their peak; a limit and `torch.OutOfMemoryError`;
- what reads memory that nothing has written: it holds NaN, also what dynamic VRAM evicts;
- what makes the host wait, with the line of the pack it happens in (`waits.watch`);
- handles of comfy-aimdo freed by a copy of their object (`aimdo.counts`); weights in a mapped file
  cannot be written to.

What it cannot show: time; real asynchrony, so a missing wait for an event is not seen; Triton;
comfy-kitchen's compiled kernels, which stay off; the rounding of CUDA's kernels, for the CPU's run;
memory that kernels take for themselves, fragmentation; Windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import native

device = native.load()

from . import attention, halves, torch_cuda, torchvision_operators  # noqa: E402

__all__ = ["capability", "device", "memory_limit", "peak_of", "start"]


def start(memory_gb: float = 12.0, capability: tuple[int, int] = (8, 6)) -> None:
    """Switch it on; once, before anything asks torch for a card."""
    torch_cuda.state.total = int(memory_gb * 1e9)
    torch_cuda.state.capability = capability
    device.set_limit(torch_cuda.state.total)
    device.poison(True)
    torchvision_operators.define()
    torch_cuda.install()
    attention.install()
    halves.install("CUDA")


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let the card have `size` bytes only."""
    device.set_limit(size)
    try:
        yield
    finally:
        device.set_limit(torch_cuda.state.total)


@contextlib.contextmanager
def capability(major: int, minor: int) -> Iterator[None]:
    """Let it be a card of another compute capability."""
    before = torch_cuda.state.capability
    torch_cuda.state.capability = (major, minor)
    try:
        yield
    finally:
        torch_cuda.state.capability = before


def peak_of(call) -> tuple[int, object]:
    """(bytes that `call` had out at most beyond those before, its result)."""
    device.reset_peak()
    before = device.allocated()
    result = call()
    return device.peak() - before, result
