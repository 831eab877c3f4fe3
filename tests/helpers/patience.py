"""Waiting for a cause. A busy machine only makes it take longer: the limit is there for a hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

HANG = 900.0  # seconds that no machine needs for what a test waits for
FOREVER = 10 * HANG  # how long a stub keeps silent that must be given up before it speaks
PAUSE = 0.01


def until(condition: Callable[[], object], say: Callable[[], object] = str) -> None:
    """Return when the condition holds; say: what to add when it never does."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, f"never came: {say()}"
        time.sleep(PAUSE)


async def comes(condition: Callable[[], object], say: Callable[[], object] = str) -> None:
    """`until` for an event loop, which keeps running."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, f"never came: {say()}"
        await asyncio.sleep(PAUSE)
