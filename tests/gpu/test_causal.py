"""Pages in main memory on a card: the same numbers as pages on it, with copies on a stream beside a
busy one; and the bytes that torch counts are those of the formula.
"""

from __future__ import annotations

import gc

import pytest
import torch

from frugal.kernels.causal import paged_attention, strategies
from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.paged_kernels import KERNELS
from frugal.kernels.causal.storage import KINDS, PageFormat
from frugal.kernels.causal.strategies import CHUNKED, EFFICIENT, FLASH, GATHERED, with_lse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, BUSY = 6, 2_000_000


def film(kind: str, on_host: bool, way: str, blocks: int = 12, width: int = 128):
    """A checksum of what each attention call of a video saw, and the cache."""
    cuda = torch.device("cuda")
    fmt = PageFormat((1, 1560, 12, width), torch.bfloat16, kind)
    options = CacheOptions(4, 1, kind, relative=True, on_host=on_host, way=way)
    cache, seen = VideoCache(fmt, LAYERS, cuda, options), []
    make = torch.Generator("cuda").manual_seed(1)

    def call():
        for layer in range(LAYERS):
            k, v = torch.randn(2, *fmt.shape, generator=make, device=cuda).bfloat16().unbind(0)
            cache.store(layer, (0,), k, v)
            # The device is behind the host, as it is under a model.
            torch.cuda._sleep(BUSY)
            if way == CHUNKED:
                runs = cache.runs(layer, (0,), k, v, 2)
                parts = [torch.cat(x, 1) for x in zip(*runs, strict=True)]
            else:
                parts = cache.gathered(layer, (0,), k, v)
            seen.extend(each.view(torch.int16).sum(dtype=torch.int64) for each in parts)

    for _ in range(blocks):
        cache.start_block(1)
        call()
        with cache.writing(torch.zeros(1, 1, 1, 1, 1, device=cuda)):
            call()
    torch.cuda.synchronize()
    return torch.stack(seen).cpu(), cache


@pytest.mark.parametrize("way", [GATHERED, CHUNKED])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_from_main_memory_are_the_same(kind, way):
    wanted, _ = film(kind, False, way)
    found, cache = film(kind, True, way)
    assert torch.equal(found, wanted)
    assert cache.staging.ahead > 5 * cache.staging.late
    page = cache.pool.read(next(iter(cache.streams[0].values()))[0])
    assert page.k.is_pinned() and page.k.device.type == "cpu"


def test_bytes_on_the_card_are_those_of_the_formula():
    gc.collect()
    before = torch.cuda.memory_allocated()
    _, cache = film("model", False, GATHERED)
    held = torch.cuda.memory_allocated() - before
    # What the last block left: the window and the sink, each page two tensors of a whole number of
    # the allocator's 512 bytes.
    assert cache.pool.held_bytes == LAYERS * 5 * cache.fmt.page_bytes
    assert held == pytest.approx(cache.pool.held_bytes, rel=0.03)
    cache.release()
    cache.pool.trim()
    assert torch.cuda.memory_allocated() - before < 0.01 * held
    _, hosted = film("model", True, GATHERED)
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx(hosted.staging.held_bytes, rel=0.03)
    assert hosted.staging.held_bytes == 2 * 4 * hosted.fmt.page_bytes


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT])
def test_the_fused_kernels_and_their_lse(monkeypatch, kernel):
    """With the one for cards before Ampere, on rows that it rounds up."""
    make = torch.Generator("cuda").manual_seed(3)
    q, k, v = torch.randn(3, 2, 12, 1570, 128, generator=make, device="cuda").half().unbind(0)
    scores = (q.double() @ k.double().mT) * 128**-0.5
    monkeypatch.setattr(strategies, "cuda_kernel", lambda *_: kernel)
    out, lse = with_lse(q, k, v)
    assert (lse - scores.logsumexp(-1)).abs().max() < 0.01
    wanted = scores.softmax(-1) @ v.double()
    assert (out - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("tokens", [1560, 1024])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda each: each.name)
def test_kernels_that_read_pages(kernel, tokens):
    cuda = torch.device("cuda")
    fmt = PageFormat((2, tokens, 12, 128), torch.bfloat16)
    reason = kernel.why_not(fmt, cuda, 9)
    if reason:
        pytest.skip(reason)
    slab, make = (
        paged_attention.Slab(fmt, 9, cuda, kernel.rows),
        torch.Generator("cuda").manual_seed(2),
    )
    pages = [slab.page() for _ in range(9)]
    for page in pages:
        k, v = torch.randn(2, *fmt.shape, generator=make, device=cuda).bfloat16().unbind(0)
        fmt.write(page, k, v)
    chosen = [7, 0, 4, 3]
    table = torch.tensor([[2 * page + s for page in chosen] for s in range(2)], device=cuda)
    q = torch.randn(2, 3 * tokens, 12, 128, generator=make, device=cuda).bfloat16()
    out, lse = kernel.attend(q, slab, kernel.prepare(slab, table, 3 * tokens))
    k, v = (torch.cat([getattr(pages[n], name) for n in chosen], 1) for name in ("k", "v"))
    wanted, wanted_lse = with_lse(*(each.transpose(1, 2) for each in (q, k, v)))
    assert (out.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()
    assert (lse - wanted_lse).abs().max() < 0.01
