"""flex_attention over pages of one slab is softmax attention over the pages of its table."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.kv import attend, paged
from frugal.kernels.kv.cache import CacheOptions, VideoCache
from frugal.kernels.kv.storage import PageFormat

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "samples", "streams"), [(128, 1, 1), (150, 2, 2), (40, 1, 2)])
def test_pages_of_the_table_and_no_others(tokens, samples, streams):
    fmt = PageFormat((samples, tokens, 2, 16), torch.float32)
    slab = paged.Slab(fmt, 7, CPU)
    make = torch.Generator().manual_seed(tokens)
    pages = [slab.page() for _ in range(7)]
    assert slab.page() is None
    for page in pages:
        fmt.write(page, *torch.randn(2, *fmt.shape, generator=make).unbind(0))
    # Two streams of three pages each, in no order.
    tables = [[4, 1, 6], [0, 5, 3]][:streams]
    table = torch.tensor(
        [[page * samples + s for page in each] for each in tables for s in range(samples)]
    )
    q = torch.randn(streams * samples, tokens, 2, 16, generator=make)
    out, lse = paged.attend(q, slab, paged.block_mask(slab, table, tokens), compiled=False)
    for row in range(streams * samples):
        chosen = [pages[n] for n in tables[row // samples]]
        k, v = (
            torch.cat([getattr(page, name)[row % samples] for page in chosen])[None]
            for name in ("k", "v")
        )
        wanted, wanted_lse = attend.with_lse(*(x.transpose(1, 2) for x in (q[row : row + 1], k, v)))
        assert (out[row] - wanted[0]).abs().max() < 1e-5
        assert (lse[row] - wanted_lse[0]).abs().max() < 1e-5


def test_where_it_cannot_be_used_it_says_why():
    fmt = PageFormat((1, 128, 2, 16), torch.float32)
    assert "no compiled kernel for cpu" in paged.why_not(fmt, CPU, False, 3)
    assert "relative positions" in paged.why_not(fmt, CPU, True, 3)
    eight = PageFormat((1, 128, 2, 16), torch.float32, "int8")
    assert "int8 pages" in paged.why_not(eight, CPU, False, 3)
    # 1.3B with window 21 and sink 3 fits in 32 bits, 14B does not.
    small, large = (PageFormat((1, 1560, h, 128), torch.bfloat16) for h in (12, 40))
    assert paged.Slab.elements(small, 30 * 24) < paged.LARGEST < paged.Slab.elements(large, 40 * 24)


@pytest.fixture
def anywhere(monkeypatch):
    """As on a card: without a compiled kernel, which the CPU has no need to make."""
    monkeypatch.setattr(paged, "why_not", lambda *_: "")
    monkeypatch.setattr(paged, "COMPILED", False)


def video(blocks=4, reserve=24, **options):
    """Attention of each block of a video in place, and over the gathered keys; the cache."""
    fmt = PageFormat((1, 40, 2, 16), torch.float32)
    cache = VideoCache(fmt, 2, CPU, CacheOptions(window=3, sink=1, way=attend.IN_PLACE, **options))
    cache.reserve(reserve)
    make, pairs = torch.Generator().manual_seed(1), []
    for _ in range(blocks):
        cache.start_block(1)
        with cache.writing(torch.zeros(1, 1, 1, 1, 1)):
            for layer in range(2):
                q, k, v = torch.randn(3, 2, 40, 2, 16, generator=make).unbind(0)
                cache.store(layer, (1, 0), k, v)
                found = cache.attended_in_place(layer, (1, 0), q, k, v)
                exact = attend.merged(q, [cache.gathered(layer, (1, 0), k, v)])
                pairs.append((found, exact))
    return cache, pairs


def test_a_video_in_place(anywhere):
    cache, pairs = video()
    assert [found is None for found, _ in pairs] == [True] * 2 + [False] * 6
    assert all((found - exact).abs().max() < 1e-5 for found, exact in pairs[2:])
    assert (cache.in_place.calls, cache.in_place.loose, cache.in_place.reason) == (6, 0, "")
    assert "6 calls" in cache.in_place.text()
    # A branch attends in place too, as far as its pages are in the slab.
    assert cache.fork().in_place is cache.in_place
    cache.park()
    assert cache.in_place.slab is None


def test_pages_outside_of_the_slab_are_gathered(anywhere):
    cache, pairs = video(reserve=8)
    assert [found is None for found, _ in pairs] == [True] * 2 + [False] * 4 + [True] * 2
    assert cache.in_place.loose == 2
    assert "2 gathered because" in cache.in_place.text()


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_is_wrong_is_found_at_its_first_call(anywhere, monkeypatch, fault):
    def broken(q, *_):
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        heads_first = q.transpose(1, 2)
        return heads_first, torch.zeros(heads_first.shape[:3])

    monkeypatch.setattr(paged, "attend", broken)
    cache, pairs = video()
    assert all(found is None for found, _ in pairs)
    expected = {"wrong": "was off by", "raises": "raised RuntimeError: no kernel image"}[fault]
    assert expected in cache.in_place.text()


def test_a_slab_beyond_the_budget_is_not_made(anywhere):
    # Pages of 40 tokens fit, rounded up to 128 they do not.
    cache, pairs = video(budget=24 * 2 * 40 * 2 * 16 * 4 + 1)
    assert all(found is None for found, _ in pairs) and cache.in_place.slab is None
    assert "more than the budget" in cache.in_place.text()
