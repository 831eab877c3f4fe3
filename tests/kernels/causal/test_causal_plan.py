"""What a causal run keeps, by arithmetic, and which settings are advised when it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.storage import FP8, INT8, wan_page
from frugal.kernels.causal.strategies import CHUNKED, GATHERED, over_pages
from frugal.kernels.memory.causal import RUN_COPIES, CausalMemory, Needs, remedies
from frugal.kernels.memory.trace import trace

GB = 10**9
WINDOWED = CacheOptions(window=21, sink=3)


def memory(options=WINDOWED, frames=81, known=0, sides=2, layers=40, heads=40):
    """14B at 832 x 480 in bf16."""
    page = wan_page((1, 16, frames, 60, 104), heads, 128 * heads, torch.bfloat16, options.kind)
    return CausalMemory(options, page, layers, Needs(3, known, sides), frames)


def test_pages_are_those_of_the_frames_in_sight():
    # 1560 tokens, keys and values of 5120 numbers in 2 bytes.
    frame = 40 * 2 * 1560 * 5120 * 2
    assert memory().cache == memory().pages == 2 * 24 * frame
    assert (memory().seen, memory().kept) == (24, 21)
    assert memory(frames=9, known=4, sides=1).pages == 13 * frame
    every = memory(CacheOptions())
    assert (every.seen, every.pages) == (81, 2 * 81 * frame)
    hosted = memory(replace(WINDOWED, on_host=True))
    assert hosted.cache == 2 * 24 * frame
    # This layer's and the next one's, of the frames that are read.
    assert hosted.pages == 2 * 2 * hosted.kept * hosted.page.page_bytes > 0
    half = memory(replace(WINDOWED, kind=FP8)).pages / memory().pages
    assert 0.5 < half < 0.501


def test_notes_say_where_it_lies():
    assert "24 latent frames in the attention window, for each of" in memory().notes()[0]
    assert "in device memory" in memory().notes()[0] and len(memory().notes()) == 1
    (first, second) = memory(CacheOptions(on_host=True), sides=1).notes()
    assert "one condition" in first and "in main memory" in first and "session" in second


def test_latents_grow_with_the_run_and_not_with_what_left_the_window():
    one = 4 * 16 * 60 * 104
    short, long = (memory(frames=frames).latents(60, 104) for frames in (81, 91))
    assert long - short == 10 * RUN_COPIES * one
    few, more = (memory(frames=frames).latents(60, 104) for frames in (10, 11))
    assert more - few == (RUN_COPIES + 1) * one


@pytest.mark.parametrize("way", [GATHERED, CHUNKED])
@pytest.mark.parametrize("kind", ["model", FP8, INT8])
def test_a_filled_cache_is_read_as_a_real_one(way, kind):
    """The same count of attention over pages, with memory and without."""
    options = CacheOptions(window=5, sink=1, kind=kind, relative=True, way=way)
    found = memory(options, frames=20, layers=2, heads=2)
    peaks = []
    for real in (False, True):
        cache = found.filled(2, 2)
        if real:
            cache.device = torch.device("cpu")
            for number, stream in cache.streams.items():
                for frame in stream:
                    pages = [found.page.empty(cache.device) for _ in range(2)]
                    cache.streams[number][frame] = cache.pool.adopt(pages, away=False)
        shape = (2, 3 * 1560, 2 * 128)
        device = cache.device

        def call(cache=cache, shape=shape, device=device):
            q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
            return over_pages(cache, 0, (0, 1), q, k, v, 2, lambda q, *_: torch.empty_like(q))

        peaks.append(trace(call).peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.005)
    # Three frames of the block and as many kept ones, at least, keys and values.
    assert peaks[0] > 2 * 2 * 6 * 1560 * 256 * 2


def needed(options: CacheOptions) -> int:
    """6 GB of forward, of which gathering is 2; half a GB of pages a frame."""
    forward = 4 * GB if options.way == CHUNKED else 6 * GB
    pages = 0 if options.on_host else (options.window + options.sink) * GB // 2
    return forward + (pages // 2 if options.kind != "model" else pages)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (16.5, ["'chunked' (the same video up to rounding): 16.00", "'int8'", "window 18 "]),
        (15, ["'main memory' (the same video, slower): 6.00", "'int8'", "window 15 "]),
        (8, ["'main memory' (the same video, slower): 6.00"]),
        (4.5, ["'main memory' and attention 'chunked'"]),
        (3, ["no setting of Causal Model"]),
    ],
)
def test_advice_changes_the_least_that_fits(room, said):
    lines = remedies(WINDOWED, 3, needed, int(room * GB))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line and line.isascii()


def test_advice_repeats_no_setting_that_is_there():
    options = replace(WINDOWED, kind=FP8, way=CHUNKED, on_host=True)
    (line,) = remedies(options, 3, needed, GB)
    assert line.startswith("no setting")
    # A window that keeps everything has no largest smaller one.
    assert all("window" not in line for line in remedies(CacheOptions(), 3, needed, 6 * GB))
