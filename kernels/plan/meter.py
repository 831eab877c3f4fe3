"""Time and peak memory of a run, from its start to a reading."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

GPU, PROCESS = "cuda", "process"


@dataclass(frozen=True)
class Memory:
    """Bytes. `kind` "cuda": torch's allocator on the device, peak since the run started, `total`
    of the card and `used` by everyone on it. `kind` "process": resident memory, peak since the
    process started, `total` of the machine.
    """

    kind: str
    device: str
    peak: int
    now: int
    total: int
    used: int | None = None


def process_peak() -> int:
    """Largest resident memory of this process since it started, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Stopwatch and memory reading of one run at a time."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._earlier = 0

    def start(self, device: torch.device) -> None:
        """A run begins: restart the clock and, on CUDA, the allocator's peak."""
        self._started = time.perf_counter()
        self._earlier = 0
        if device.type == GPU:
            torch.cuda.reset_peak_memory_stats(device)

    def part(self, device: torch.device) -> Callable[[], int | None]:
        """A part of the run begins: returns a function that tells the allocator's peak since then,
        in bytes, or None on devices without such a count. The peak of the run stays known.
        """
        if device.type != GPU:
            return lambda: None
        self._earlier = max(self._earlier, torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)

    def seconds(self) -> float | None:
        """Seconds since `start`, or None if no start was seen."""
        return None if self._started is None else time.perf_counter() - self._started

    def memory(self, device: torch.device) -> Memory:
        """Peak and current memory: of the device if it is CUDA, else of the process."""
        if device.type == GPU:
            free, total = torch.cuda.mem_get_info(device)
            return Memory(
                GPU,
                torch.cuda.get_device_name(device),
                max(self._earlier, torch.cuda.max_memory_allocated(device)),
                torch.cuda.memory_allocated(device),
                total,
                total - free,
            )
        now = psutil.Process(os.getpid()).memory_info().rss
        total = psutil.virtual_memory().total
        return Memory(PROCESS, device.type, max(process_peak(), now), now, total)
