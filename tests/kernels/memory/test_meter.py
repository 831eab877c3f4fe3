"""Peaks on a card whose allocator does not see everything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from frugal.kernels.memory.meter import Memory, Meter
from frugal.kernels.memory.run_report import Frames, RunReport

CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """What a card would tell, set by the test."""
    now = SimpleNamespace(tensors=0, peak=0, outside=0)

    def reset(_):
        now.peak = now.tensors

    for name, answer in {
        "reset_peak_memory_stats": reset,
        "max_memory_allocated": lambda _: now.peak,
        "memory_allocated": lambda _: now.tensors,
        "mem_get_info": lambda _: (60 * 10**6, 100 * 10**6),
        "get_device_name": lambda _: "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return now


def test_a_peak_counts_both(card):
    meter = Meter(lambda device: card.outside)
    meter.start(CARD)
    card.tensors = card.peak = 8 * 10**6
    card.outside = 20 * 10**6
    meter.look(CARD)
    card.outside = 5 * 10**6
    part = meter.part(CARD)
    card.peak, card.outside = 9 * 10**6, 7 * 10**6
    assert part() == 16 * 10**6
    card.outside = 3 * 10**6
    assert part() == 16 * 10**6
    memory = meter.memory(CARD)
    assert (memory.peak, memory.now, memory.streamed) == (29 * 10**6, 11 * 10**6, 20 * 10**6)
    line = RunReport(None, memory).text().split("\n")[2]
    assert "29.0 MB at peak" in line and "20.0 MB of weights in dynamic VRAM" in line
    meter.start(CARD)
    assert meter.memory(CARD).streamed == 3 * 10**6


def test_without_it_only_the_allocator_counts(card):
    meter = Meter()
    meter.start(CARD)
    card.peak = 9 * 10**6
    memory = meter.memory(CARD)
    assert (memory.peak, memory.streamed) == (9 * 10**6, 0)
    assert "(torch allocator, a card)" in RunReport(None, memory).text()


def test_the_first_line_is_the_sum():
    memory = Memory("cuda", "a card", peak=2 * 10**9, now=1, total=3)
    frames = Frames(81, 832, 480)
    long = RunReport(210.4, memory, frames=frames, price_per_hour=0.5, currency="EUR")
    assert long.text().split("\n")[0] == "81 frames, 210 s, 0.03 EUR, peak 2.00 GB"
    process = Memory("process", "cpu", peak=2 * 10**9, now=1, total=3)
    assert RunReport(3.21, process, price_per_hour=0.5).verdict() == "3.2 s, 0.0004 USD"
    assert RunReport(None, process).verdict() == "time and cost are not known"
