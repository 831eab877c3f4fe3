"""Pages in main memory instead of the device's, bit for bit, and back."""

from __future__ import annotations

from typing import Any

import torch

from .storage import Page, empty

HOST = torch.device("cpu")


def pins(device: torch.device) -> bool:
    """Whether main memory for pages of `device` should be pinned: CUDA copies pinned memory without
    waiting, and other devices have no use for it.
    """
    return device.type == "cuda" and torch.cuda.is_available()


def to_host(page: Page, device: torch.device) -> Page:
    """A copy in main memory, pinned where `device`, which it will return to, profits and there is
    such memory. A page that is there already is returned as it is.
    """
    if page.k.device == HOST:
        return page
    held = {}
    for name, tensor in page.tensors().items():
        held[name] = empty(tensor.shape, tensor.dtype, HOST, pins(device)).copy_(tensor)
    return Page(**held)


def to_device(page: Page, device: torch.device) -> Page:
    """A copy on `device`, or the page itself if it is there."""
    if page.k.device == device:
        return page
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in page.tensors().items()}
    return Page(**moved)
