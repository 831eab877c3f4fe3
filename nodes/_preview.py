"""Previews on a node: a few frames, small, and only where a page is open to show them.

Writing a full-size PNG takes ten times as long as most work on masks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from comfy_api.v0_0_2 import ui

FRAMES, LONGEST = 4, 384  # most frames of a clip, and px of their longer side


def watched() -> bool:
    """Whether the running prompt came from a page or client that listens for what nodes show."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # none outside ComfyUI's main
    return getattr(getattr(server, "instance", None), "client_id", None) is not None


def preview(batch: torch.Tensor) -> Any:
    """A `ui` value of an IMAGE [B, H, W, C] or a MASK [B, H, W]; None without frames or watcher."""
    if not len(batch) or not watched():
        return None
    shown = small(batch)
    return ui.PreviewMask(shown) if batch.ndim == 3 else ui.PreviewImage(shown[..., :3])


def small(batch: torch.Tensor) -> torch.Tensor:
    """At most `FRAMES` frames, evenly spread with the first and the last, of at most `LONGEST` px a
    side, by leaving out rows and columns.
    """
    if len(batch) > FRAMES:
        batch = batch[[round(n * (len(batch) - 1) / (FRAMES - 1)) for n in range(FRAMES)]]
    step = -(-max(batch.shape[1:3]) // LONGEST)
    return batch[:, step // 2 :: step, step // 2 :: step]
