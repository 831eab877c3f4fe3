"""Kernels over pages of one slab give softmax attention over the pages of their table.

flex_attention runs as it is written. FlashAttention 3 and torch's varlen_attn with a block table
need a card: functions with their published parameters and shapes stand in for them, which take
nothing else. They prove the calls, not the kernels.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from frugal.kernels.causal import paged_attention, paged_kernels, session_file, strategies
from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.paged_kernels import FLASH_3, FLEX, VARLEN
from frugal.kernels.causal.storage import PageFormat
from frugal.kernels.compile import graphs

CPU = torch.device("cpu")


def over_table(q, k_pages, v_pages, table, counts):
    """(out [N, Lq, H, D], lse [N, H, Lq]) of q over the first counts[n] keys of the table's row."""
    rows = []
    for query, pages, count in zip(q, table.long(), counts.tolist(), strict=True):
        k, v = (each[pages].flatten(0, 1)[None, :count] for each in (k_pages, v_pages))
        rows.append(strategies.with_lse(*(each.transpose(1, 2) for each in (query[None], k, v))))
    out, lse = (torch.cat(each) for each in zip(*rows, strict=True))
    return out.transpose(1, 2), lse


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, page_table, return_softmax_lse=False
):
    pages, _, heads, width = k_cache.shape
    assert q.shape[2:] == (heads, width) and v_cache.shape == k_cache.shape
    assert cache_seqlens.dtype == page_table.dtype == torch.int32
    assert page_table.is_contiguous() and page_table.max() < pages
    out, lse = over_table(q, k_cache, v_cache, page_table, cache_seqlens)
    return (out, lse, None, None) if return_softmax_lse else out


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, seqused_k, block_table
):
    assert key.shape[1] % 256 == 0 and cu_seq_k is None
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert cu_seq_q.diff().tolist() == [max_q] * len(block_table)
    assert seqused_k.max() <= max_k == block_table.shape[1] * key.shape[1]
    q = query.view(len(block_table), max_q, *query.shape[1:])
    out, lse = over_table(q, key, value, block_table, seqused_k)
    assert return_aux.lse
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


@pytest.fixture(autouse=True)
def without_card(monkeypatch):
    monkeypatch.setattr(paged_kernels, "BACKEND", "")
    monkeypatch.setattr(paged_kernels, "flash_3", lambda: flash_attn_with_kvcache)
    monkeypatch.setattr(paged_kernels, "varlen", lambda: varlen_attn)


@pytest.mark.parametrize("samples, streams", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize(
    "kernel, tokens", [(FLASH_3, 40), (FLASH_3, 256), (VARLEN, 256), (FLEX, 150), (FLEX, 256)],
    ids=lambda each: getattr(each, "name", each),
)  # fmt: skip
def test_pages_of_the_table_and_no_others(kernel, tokens, samples, streams):
    fmt = PageFormat((samples, tokens, 2, 16), torch.float32)
    slab = paged_attention.Slab(fmt, 7, CPU, kernel.rows)
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
    queries = 2 * tokens
    q = torch.randn(streams * samples, queries, 2, 16, generator=make)
    out, lse = kernel.attend(q, slab, kernel.prepare(slab, table, queries))
    for row in range(streams * samples):
        chosen = [pages[n] for n in tables[row // samples]]
        k, v = (
            torch.cat([getattr(page, name)[row % samples] for page in chosen])[None]
            for name in ("k", "v")
        )
        wanted, wanted_lse = strategies.with_lse(
            *(x.transpose(1, 2) for x in (q[row : row + 1], k, v))
        )
        assert (out[row] - wanted[0]).abs().max() < 1e-5
        assert (lse[row] - wanted_lse[0]).abs().max() < 1e-5


def test_flex_is_compiled_for_every_slab(monkeypatch):
    """Beyond the limit of torch.compile it would run as it is written, with every score at once."""
    made = []

    class Counted(graphs.Graphs):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            made.append(self)

    monkeypatch.setattr(graphs, "Graphs", Counted)
    monkeypatch.setattr(paged_kernels, "BACKEND", "eager")
    fmt = PageFormat((1, 128, 1, 16), torch.float32)
    q, table = torch.randn(1, 128, 1, 16), torch.tensor([[1, 0]])
    for pages in range(2, 14):
        slab = paged_attention.Slab(fmt, pages, CPU, FLEX.rows)
        FLEX.attend(q, slab, FLEX.prepare(slab, table, 128))
    assert [each.made for each in made] == [12]


def test_what_flex_is_told_is_small():
    """One list of pages for all rows of q, whole blocks and partly empty ones apart."""
    slab = paged_attention.Slab(PageFormat((1, 150, 1, 16), torch.float32), 7, CPU, FLEX.rows)
    mask = FLEX.prepare(slab, torch.tensor([[4, 1, 6], [0, 5, 3]]), 1000)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape == (2, 1, 1, 2 * 7)
    assert mask.BLOCK_SIZE == (1024, 128)
    assert mask.full_kv_indices[0, 0, 0, :3].tolist() == [8, 2, 12]
    assert mask.kv_indices[1, 0, 0, :3].tolist() == [1, 11, 7]
    assert mask.kv_num_blocks.flatten().tolist() == [3, 3]


def test_where_none_can_be_used_it_says_why():
    fmt = PageFormat((1, 1560, 12, 128), torch.bfloat16)
    none, said = paged_attention.choose(fmt, CPU, False, 3)
    assert none is None and "flex_attention has no compiled kernel for cpu" in said
    assert "flash_attn_interface (FlashAttention 3) is not installed" in said
    assert "varlen_attn" in said
    assert "relative positions" in paged_attention.choose(fmt, CPU, True, 3)[1]
    eight = PageFormat((1, 128, 2, 16), torch.float32, "int8")
    assert "int8 pages" in paged_attention.choose(eight, CPU, False, 3)[1]
    assert paged_attention.forecast(fmt, CPU, True).startswith("not possible, relative")


def card(monkeypatch, capability, fa3):
    """As on a CUDA card of that compute capability, with or without FlashAttention 3."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(paged_kernels, "_has_triton", lambda: True)
    find = paged_kernels.importable
    monkeypatch.setattr(
        paged_kernels,
        "importable",
        lambda name: fa3 if name == "flash_attn_interface" else find(name),
    )


@pytest.mark.parametrize(
    ("capability", "fa3", "tokens", "dtype", "chosen"),
    [
        ((9, 0), True, 1560, torch.bfloat16, FLASH_3),
        ((9, 0), True, 1560, torch.float32, FLEX),
        ((9, 0), False, 1560, torch.bfloat16, FLEX),
        ((12, 0), True, 1560, torch.bfloat16, FLEX),
        ((8, 6), True, 1560, torch.bfloat16, FLEX),
        ((8, 6), True, 1024, torch.bfloat16, VARLEN),
        ((7, 5), True, 1024, torch.float16, FLEX),
    ],
)
def test_the_kernel_that_a_card_gets(monkeypatch, capability, fa3, tokens, dtype, chosen):
    card(monkeypatch, capability, fa3)
    fmt = PageFormat((1, tokens, 12, 128), dtype)
    assert paged_attention.choose(fmt, torch.device("cuda"), False, 30 * 24) == (chosen, "")


def test_a_package_that_is_empty_is_passed_over(monkeypatch):
    def empty():
        raise ImportError("cannot import name 'flash_attn_with_kvcache'")

    card(monkeypatch, (9, 0), True)
    monkeypatch.setattr(paged_kernels, "flash_3", empty)
    fmt = PageFormat((1, 1560, 12, 128), torch.bfloat16)
    assert paged_attention.choose(fmt, torch.device("cuda"), False, 30 * 24) == (FLEX, "")
    said = paged_kernels.refusals(fmt, torch.device("cuda"), 30 * 24)[FLASH_3.name]
    assert said == "flash_attn_interface cannot be imported (ImportError)"


def test_more_pages_than_flex_counts(monkeypatch):
    """1.3B with window 21 and sink 3 fits in 32 bits, 14B does not."""
    card(monkeypatch, (8, 6), False)
    small, large = (PageFormat((1, 1560, h, 128), torch.bfloat16) for h in (12, 40))
    assert paged_attention.choose(small, torch.device("cuda"), False, 30 * 24)[0] is FLEX
    kernel, said = paged_attention.choose(large, torch.device("cuda"), False, 40 * 24)
    assert kernel is None and "more numbers than the kernel can count" in said
    assert "1560 tokens per page" in said


@pytest.fixture(params=[FLEX, FLASH_3], ids=lambda kernel: kernel.name)
def anywhere(request, monkeypatch):
    """As on a card that has this kernel."""
    monkeypatch.setattr(paged_attention, "choose", lambda *_: (request.param, ""))
    return request.param


def video(blocks=4, reserve=24, **options):
    """Attention of each block of a video, paged, and over the gathered keys; the cache."""
    fmt = PageFormat((1, 40, 2, 16), torch.float32)
    cache = VideoCache(fmt, 2, CPU, CacheOptions(window=3, sink=1, way=strategies.PAGED, **options))
    cache.reserve(reserve)
    make, pairs = torch.Generator().manual_seed(1), []
    for _ in range(blocks):
        pairs += block(cache, make)
    return cache, pairs


def block(cache, make):
    """The attention of one more block, layer by layer: (paged, over the gathered keys)."""
    pairs = []
    cache.start_block(1)
    with cache.writing(torch.zeros(1, 1, 1, 1, 1)):
        for layer in range(2):
            q, k, v = torch.randn(3, 2, 40, 2, 16, generator=make).unbind(0)
            cache.store(layer, (1, 0), k, v)
            found = cache.attended_paged(layer, (1, 0), q, k, v)
            pairs.append((found, strategies.merged(q, [cache.gathered(layer, (1, 0), k, v)])))
    return pairs


def test_a_paged_video(anywhere):
    cache, pairs = video()
    assert [found is None for found, _ in pairs] == [True] * 2 + [False] * 6
    assert all((found - exact).abs().max() < 1e-5 for found, exact in pairs[2:])
    assert (cache.paged.calls, cache.paged.loose, cache.paged.reason) == (6, 0, "")
    assert f"by {anywhere.name}: 6 calls" in cache.paged.text()
    assert cache.fork().paged is cache.paged


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_paged_session_goes_on(anywhere, tmp_path, from_disk):
    """Its pages come back into the slab: apart from it they would take their memory twice."""
    cache, _ = video()
    cache.offload()
    assert cache.paged.slab is None
    if from_disk:
        session_file.save(cache, tmp_path / "video.safetensors")
        cache = session_file.load(tmp_path / "video.safetensors", CPU)
    for branch in (cache.fork(), cache.fork()):
        branch.reserve(24)
        branch.unpark()
        held = [branch.pool.read(page) for s in branch.streams.values() for f in s.values()
                for page in f]  # fmt: skip
        assert len(held) == 16 and all(page.slab is branch.paged.slab for page in held)
        found, exact = block(branch, torch.Generator().manual_seed(2))[0]
        assert (found - exact).abs().max() < 1e-5
        assert branch.paged.loose == 0
        branch.offload()


def test_pages_outside_of_the_slab_are_gathered(anywhere):
    cache, pairs = video(reserve=8)
    assert [found is None for found, _ in pairs] == [True] * 2 + [False] * 4 + [True] * 2
    assert cache.paged.loose == 2
    assert "2 gathered because" in cache.paged.text()


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_is_wrong_is_found_at_its_first_call(monkeypatch, caplog, fault):
    def broken(q, *_):
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        heads_first = q.transpose(1, 2)
        return heads_first, torch.zeros(heads_first.shape[:3])

    kernel = dataclasses.replace(FLASH_3, attend=broken)
    monkeypatch.setattr(paged_attention, "choose", lambda *_: (kernel, ""))
    cache, pairs = video()
    assert all(found is None for found, _ in pairs)
    expected = {"wrong": "was off by", "raises": "raised RuntimeError: no kernel image"}[fault]
    assert expected in cache.paged.text() and expected in caplog.text


def test_a_slab_beyond_the_budget_is_not_made(monkeypatch):
    monkeypatch.setattr(paged_attention, "choose", lambda *_: (FLEX, ""))
    # Pages of 40 tokens fit, rounded up to 128 they do not.
    cache, pairs = video(budget=24 * 2 * 40 * 2 * 16 * 4 + 1)
    assert all(found is None for found, _ in pairs) and cache.paged.slab is None
    assert "more than the budget" in cache.paged.text()


def test_what_a_page_takes_is_counted_with_its_rows(anywhere):
    """At the most: flex_attention pads a page of 40 tokens to 128 rows, the others do not."""
    cache, _ = video()
    counted = cache.options.page_bytes(cache.fmt)
    slab = cache.paged.slab
    taken = (slab.k.nbytes + slab.v.nbytes) / slab.k.shape[0]
    assert counted == taken if anywhere is FLEX else counted > taken
    other = CacheOptions(window=3, sink=1, way=strategies.PAGED, relative=True)
    assert other.page_bytes(cache.fmt) == cache.fmt.page_bytes
