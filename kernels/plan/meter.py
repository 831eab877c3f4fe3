"""Time and peak memory of a run, from its start to a reading."""

from __future__ import annotations

import os
import sys
import time
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

    def start(self, device: torch.device) -> None:
        """A run begins: restart the clock and, on CUDA, the allocator's peak."""
        self._started = time.perf_counter()
        if device.type == GPU:
            torch.cuda.reset_peak_memory_stats(device)

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
                torch.cuda.max_memory_allocated(device),
                torch.cuda.memory_allocated(device),
                total,
                total - free,
            )
        now = psutil.Process(os.getpid()).memory_info().rss
        total = psutil.virtual_memory().total
        return Memory(PROCESS, device.type, max(process_peak(), now), now, total)
