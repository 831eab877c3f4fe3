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
    """Bytes. `kind` "cuda": tensors on the device, peak since the run started, `total` of the card
    and `used` by everyone on it. `kind` "process": resident memory, peak since the process started,
    `total` of the machine. streamed: of the peak, weights that dynamic VRAM holds outside torch's
    allocator.
    """

    kind: str
    device: str
    peak: int
    now: int
    total: int
    used: int | None = None
    streamed: int = 0


def process_peak() -> int:
    """Largest resident memory of this process since it started, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Stopwatch and memory reading of one run at a time.

    outside: bytes on a device now that torch's allocator does not see. They have no peak of their
    own, so `look` asks for them between calls; the largest is added to the allocator's peak, though
    the two may not have been at the same time.
    """

    def __init__(self, outside: Callable[[torch.device], int] = lambda _: 0) -> None:
        self._started: float | None = None
        self._earlier = 0
        self._outside = outside
        self._largest = self._largest_of_part = 0

    def look(self, device: torch.device) -> int:
        """Note what is outside torch's allocator at this moment of the run; bytes."""
        if device.type != GPU:
            return 0
        now = self._outside(device)
        self._largest = max(self._largest, now)
        self._largest_of_part = max(self._largest_of_part, now)
        return now

    def start(self, device: torch.device) -> None:
        """A run begins: restart the clock and, on CUDA, the allocator's peak."""
        self._started = time.perf_counter()
        self._earlier = self._largest = self._largest_of_part = 0
        if device.type == GPU:
            torch.cuda.reset_peak_memory_stats(device)

    def part(self, device: torch.device) -> Callable[[], int | None]:
        """A part of the run begins: returns a function that tells the peak since then, in bytes, or
        None on devices without such a count. The peak of the run stays known.
        """
        if device.type != GPU:
            return lambda: None
        self._earlier = max(self._earlier, torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        self._largest_of_part = 0
        self.look(device)

        def peak() -> int:
            self.look(device)
            return torch.cuda.max_memory_allocated(device) + self._largest_of_part

        return peak

    def seconds(self) -> float | None:
        """Seconds since `start`, or None if no start was seen."""
        return None if self._started is None else time.perf_counter() - self._started

    def memory(self, device: torch.device) -> Memory:
        """Peak and current memory: of the device if it is CUDA, else of the process."""
        if device.type == GPU:
            free, total = torch.cuda.mem_get_info(device)
            now = self.look(device)
            return Memory(
                GPU,
                torch.cuda.get_device_name(device),
                max(self._earlier, torch.cuda.max_memory_allocated(device)) + self._largest,
                torch.cuda.memory_allocated(device) + now,
                total,
                total - free,
                self._largest,
            )
        now = psutil.Process(os.getpid()).memory_info().rss
        total = psutil.virtual_memory().total
        return Memory(PROCESS, device.type, max(process_peak(), now), now, total)
