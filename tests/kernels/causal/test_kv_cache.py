"""A video's cache keeps the frames that window and sink name, shares them with its branches, and a
failure at any layer changes nothing.
"""

from __future__ import annotations

import gc
import random

import pytest
import torch

from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.storage import PageFormat
from frugal.kernels.causal.strategies import merged
from frugal.kernels.errors import FrugalError

B, TOKENS, HEADS, WIDTH, LAYERS = 1, 4, 2, 16, 3
CPU = torch.device("cpu")


def new(**options) -> VideoCache:
    fmt = PageFormat((B, TOKENS, HEADS, WIDTH), torch.float32, options.get("kind", "model"))
    return VideoCache(fmt, LAYERS, CPU, CacheOptions(**options))


def kv(frame, count, layer, stream, salt=0):
    """What a layer makes of a block: depends on all that it should depend on."""
    parts = [
        torch.randn(
            2, B, TOKENS, HEADS, WIDTH,
            generator=torch.Generator().manual_seed(1000 * f + 10 * layer + stream + salt),
        )
        for f in range(frame, frame + count)
    ]  # fmt: skip
    return torch.cat(parts, dim=2).unbind(0)


def write(cache, count, streams=(0, 1), frame=None, salt=0):
    cache.start_block(count, frame)
    first = cache.next_frame if frame is None else frame
    with cache.writing(torch.full((B, 1, count, 1, 1), float(first))):
        for layer in range(LAYERS):
            each = [kv(first, count, layer, s, salt) for s in streams]
            k, v = (torch.cat(part) for part in zip(*each, strict=True))
            cache.store(layer, streams, k, v)


def held(cache, layer=1, stream=0):
    """The keys a next block would see, without its own."""
    k, v = kv(99, 1, layer, stream)
    return cache.gathered(layer, (stream,), k, v)[0][:, :-TOKENS]


@pytest.mark.parametrize(("window", "sink", "block"), [(0, 0, 2), (4, 0, 2), (4, 1, 2), (3, 3, 1)])
def test_frames_kept_and_bytes(window, sink, block):
    cache = new(window=window, sink=sink)
    sizes = []
    for start in range(0, 20, block):
        write(cache, block)
        last = start + block - 1
        wanted = [f for f in range(last + 1) if not window or f > last - window or f < sink]
        assert [each.frame for each in cache.kept] == wanted
        assert set(cache.clean) == set(wanted)
        expected = torch.cat([kv(f, 1, 1, 0)[0] for f in wanted], dim=1)
        assert torch.equal(held(cache), expected)
        sizes.append(cache.pool.used_bytes)
        assert sizes[-1] == 2 * LAYERS * len(wanted) * cache.fmt.page_bytes
    assert cache.pool.peak_bytes == cache.pages_for(20, 2) * cache.fmt.page_bytes
    if window:
        assert len(set(sizes[(window + sink) // block :])) == 1
        assert cache.pool.held_bytes == cache.pool.peak_bytes
    cache.release()
    assert cache.pool.used_bytes == 0


def test_positions():
    near, far = new(window=4, sink=1, relative=True), new(window=4, sink=1)
    places = []
    for _ in range(8):
        places.append((near.start_block(2), far.start_block(2)))
        write(near, 2)
        write(far, 2)
    assert [place for _, place in places] == list(range(0, 16, 2))
    assert [place for place, _ in places] == [0, 2] + [3] * 6


def test_runs_and_gathering_agree():
    cache = new(window=5, sink=1, relative=True)
    for _ in range(5):
        write(cache, 2)
    cache.start_block(2)
    k, v = (torch.cat([kv(10, 2, 1, s)[part] for s in (1, 0)]) for part in (0, 1))
    q = torch.randn(2, 2 * TOKENS, HEADS, WIDTH, generator=torch.Generator().manual_seed(5))
    whole = merged(q, [cache.gathered(1, (1, 0), k, v)])
    parts = list(cache.runs(1, (1, 0), k, v, 2))
    assert [part[0].shape[1] // TOKENS for part in parts] == [2, 2, 2]
    assert (merged(q, parts) - whole).abs().max() < 1e-5


def test_branches_share_and_do_not_meet():
    root = new(window=6)
    for _ in range(3):
        write(root, 2)
    before, size = held(root).clone(), root.pool.used_bytes
    branches = [root.fork() for _ in range(3)]
    assert root.pool.used_bytes == size
    for salt, branch in enumerate(branches):
        write(branch, 2, salt=1 + salt)
    assert torch.equal(held(root), before)
    for salt, branch in enumerate(branches):
        alone = new(window=6)
        for _ in range(3):
            write(alone, 2)
        write(alone, 2, salt=1 + salt)
        assert torch.equal(held(branch), held(alone))
    assert root.pool.used_bytes == size + 3 * (2 * 2 * LAYERS * root.fmt.page_bytes)
    pool = root.pool
    del root, branch, branches
    gc.collect()
    assert pool.used_bytes == 0


def test_a_branch_takes_a_new_window_but_no_new_format():
    root = new(window=6)
    for _ in range(3):
        write(root, 2)
    branch = root.fork(CacheOptions(window=4, budget=10**6))
    write(branch, 2)
    assert [each.frame for each in branch.kept] == [4, 5, 6, 7]
    with pytest.raises(FrugalError, match="kind int8 for a video whose cache"):
        root.fork(CacheOptions(window=6, kind="int8"))


@pytest.mark.parametrize("at", range(2 * LAYERS))
def test_a_cancel_at_any_call_changes_nothing(at):
    cache = new(window=4)
    for _ in range(2):
        write(cache, 2)
    other = cache.fork()
    cache.start_block(2)
    state = [each.frame for each in cache.kept], cache.pool.used_bytes
    calls = 0
    with pytest.raises(KeyboardInterrupt), cache.writing(torch.zeros(B, 1, 2, 1, 1)):
        for layer in range(LAYERS):
            for stream in (0, 1):
                if calls == at:
                    raise KeyboardInterrupt
                calls += 1
                cache.store(layer, (stream,), *kv(4, 2, layer, stream))
    assert ([each.frame for each in cache.kept], cache.pool.used_bytes) == state
    write(cache, 2)
    write(other, 2)
    assert torch.equal(held(cache), held(other))


def test_what_is_left_out_or_comes_twice_is_refused():
    cache = new()
    clean = torch.zeros(B, 1, 1, 1, 1)
    cache.start_block(1)
    with pytest.raises(FrugalError, match="2 of 3 layers"), cache.writing(clean):
        for layer in range(2):
            cache.store(layer, (0,), *kv(0, 1, layer, 0))
    with pytest.raises(FrugalError, match="ran twice"), cache.writing(clean):
        cache.store(0, (0,), *kv(0, 1, 0, 0))
        cache.store(0, (0,), *kv(0, 1, 0, 0))
    assert cache.pool.used_bytes == 0
    write(cache, 1)
    with pytest.raises(FrugalError, match="conditions \\[0\\] ran on clean frames"):
        write(cache, 1, streams=(0,))
    k, v = (x.repeat(2, 1, 1, 1) for x in kv(1, 1, 0, 0))
    with pytest.raises(FrugalError, match="conditions \\[0, 0\\]"):
        cache.gathered(0, (0, 0), k, v)
    with pytest.raises(FrugalError, match="condition 2 appears"):
        cache.gathered(0, (2,), *kv(1, 1, 0, 2))
    with pytest.raises(FrugalError, match="a block of 3 frames and a window of 2"):
        new(window=2).start_block(3)
    with pytest.raises(FrugalError, match="sink of 1 frames without a window"):
        new(sink=1)


def test_parked_pages_come_back_to_the_bit():
    cache = new(kind="fp8")
    write(cache, 2)
    branch, before = cache.fork(), held(cache).clone()
    cache.offload()
    assert (cache.pool.used_bytes, cache.pool.held_bytes) == (0, 0)
    assert torch.equal(held(cache), before)
    branch.unpark()
    assert cache.pool.away_bytes == 0
    assert torch.equal(held(branch), before)
    assert 0.001 < cache.error < 0.05


def test_ten_thousand_operations_on_videos():
    rng = random.Random(3)
    videos = [new(window=3, sink=1)]
    pool, done = videos[0].pool, 0
    while done < 10_000:
        chosen = rng.choice(videos)
        if rng.random() < 0.6:
            chosen.start_block(1)
            with chosen.writing(torch.zeros(B, 1, 1, 1, 1)):
                for layer in range(LAYERS):
                    chosen.store(layer, (0,), *FIXED)
            done += LAYERS
        elif len(videos) < 4:
            videos.append(chosen.fork())
            done += 1
        else:
            videos.remove(chosen)
            chosen.release()
            done += 1
        pages = {
            page
            for video in videos
            for s in video.streams.values()
            for p in s.values()
            for page in p
        }
        assert pool.used_bytes == len(pages) * pool.page_bytes
    for video in videos:
        video.release()
    assert pool.used_bytes == 0


FIXED = kv(0, 1, 0, 0)
