"""Pages in main memory instead of the device's, bit for bit, and back.

torch rounds every block of pinned memory up to a power of two and keeps it when it is freed. So
pages are cut from blocks of exactly such sizes, which serve the next video as they are.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch

from .storage import Page, PageFormat

HOST = torch.device("cpu")
# A block holds so many pages at least: its end, which is too short for one more, is small then.
PAGES = 16
ALIGNED = 64


def pins(device: torch.device) -> bool:
    """Whether main memory for pages of `device` should be pinned: CUDA copies pinned memory without
    waiting, and other devices have no use for it.
    """
    return device.type == "cuda" and torch.cuda.is_available()


class Block:
    """Pinned memory of `size` bytes, or plain memory where none is to be had: Windows pins about
    half of the main memory, most of which ComfyUI takes for weights.
    """

    def __init__(self, size: int):
        self.used = 0
        with contextlib.suppress(RuntimeError):
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            return
        self.memory = torch.empty(size, dtype=torch.uint8)


class HostPages:
    """Makes pages of one format in main memory, for `device`, to which they will go."""

    def __init__(self, fmt: PageFormat, device: torch.device):
        self.fmt, self.pinned = fmt, pins(device)
        self.span = sum(_aligned(size) for size in _sizes(fmt))
        self.block_bytes = 1 << (PAGES * self.span - 1).bit_length()
        self._blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        self._block: Block | None = None

    def make(self) -> Page:
        if not self.pinned:
            return self.fmt.empty(HOST)
        block = self._block
        if block is None or block.used + self.span > self.block_bytes:
            block = self._block = Block(self.block_bytes)
            self._blocks.add(block)
        tensors = {}
        for (name, (shape, dtype)), size in zip(
            self.fmt.parts().items(), _sizes(self.fmt), strict=True
        ):
            part = block.memory[block.used : block.used + size]
            tensors[name] = part.view(dtype).view(shape)
            block.used += _aligned(size)
        # The page keeps its block, which goes when the last of its pages goes.
        return Page(**tensors, slab=block)

    @property
    def held_bytes(self) -> int:
        """Of the blocks of which anything is in use, whole."""
        return len(self._blocks) * self.block_bytes


def _sizes(fmt: PageFormat) -> list[int]:
    return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in fmt.parts().values()]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def to_host(page: Page, pages: HostPages) -> Page:
    """A copy in main memory, made by `pages`, to be read after `settle`. A page that is there
    already is returned as it is.
    """
    if page.k.device == HOST:
        return page
    held = pages.make()
    for name, tensor in held.tensors().items():
        tensor.copy_(page.tensors()[name], non_blocking=pages.pinned)
    return held


def settle(device: torch.device) -> None:
    """Wait until what `device` writes to pinned memory is there."""
    if pins(device):
        torch.cuda.current_stream(device).synchronize()


def to_device(page: Page, device: torch.device) -> Page:
    """A copy on `device`, or the page itself if it is there."""
    if page.k.device == device:
        return page
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in page.tensors().items()}
    return Page(**moved)


def sent(numbers: Any, device: torch.device) -> torch.Tensor:
    """Integers from Python on `device`; where it can be helped, nobody waits for them."""
    made = torch.tensor(numbers)
    return made.pin_memory().to(device, non_blocking=True) if pins(device) else made.to(device)
