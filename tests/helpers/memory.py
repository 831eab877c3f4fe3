"""An oracle for memory counts that shares nothing with ours: what torch's CPU allocator reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def allocator_peak(call: Callable[[], Any]) -> int:
    """Bytes that the CPU allocator has out at most while `call` runs, beyond those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as run:
        result = call()
    del result
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "this torch reports no allocations"
    out = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        out += event.nbytes()
        most = max(most, out)
    return most
