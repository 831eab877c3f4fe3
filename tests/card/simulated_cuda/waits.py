"""What makes the host wait for the device, and where."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
SAMPLING = ("comfy/samplers.py", "comfy/model_base.py", "comfy/k_diffusion/sampling.py")
PACK = tuple(f"{ROOT / folder}/" for folder in ("nodes", "kernels"))


class Wait(NamedTuple):
    """kind: sync (the host waits), staged (it copies to the device from memory that is not pinned,
    which waits for the copy into a staging buffer). place: file:line of the pack, innermost, or ""
    where ComfyUI's own sampling waits, around which the pack's wrappers are.
    """

    kind: str
    what: str
    place: str


_seen: collections.Counter[Wait] | None = None


def note(kind: str, what: str) -> None:
    """Called by the device for each wait."""
    if _seen is not None:
        _seen[Wait(kind, what, _place())] += 1


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(SAMPLING):
            break
        if frame.f_code.co_filename.startswith(PACK):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def watch() -> Iterator[collections.Counter[Wait]]:
    """Count them while the block runs."""
    global _seen
    assert _seen is None, "already watched"
    _seen = collections.Counter()
    try:
        yield _seen
    finally:
        _seen = None
