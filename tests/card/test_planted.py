"""The tier itself: bugs of the kinds it is there for are planted, and it has to notice each."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.nodes.memory import policy
from frugal.nodes.wan import row_scaled
from frugal.tests.card import modes
from frugal.tests.card.test_memory import bounded, planned

if not modes.ON_CARD:
    pytest.skip("the bugs show on a card only", allow_module_level=True)

from frugal.tests.card.simulated_cuda import aimdo, card, waits

ROWS = "e4m3 weight_scale [rows,1], no marker (LightX2V)"
dynamic = pytest.mark.skipif(not (modes.MODE and modes.MODE.dynamic), reason="dynamic VRAM only")


def test_scale_left_on_the_cpu(bench, layouts, monkeypatch):
    model = bench.load(layouts[ROWS]())
    whole = row_scaled.dequantise
    monkeypatch.setattr(row_scaled, "dequantise", lambda q, s, d: whole(q, s.cpu(), d))
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        bench.sample(model)


def test_missing_cast():
    half = torch.ones(32, 32, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="dtype"):
        half @ half.float()


def test_memory_that_nothing_wrote():
    assert torch.empty(4, device="cuda").isnan().all()
    assert torch.empty(4, dtype=torch.bfloat16, device="cuda").isnan().all()


def test_integer_product_of_few_rows():
    a = torch.ones(16, 32, dtype=torch.int8, device="cuda")
    with pytest.raises(RuntimeError, match="greater than 16"):
        torch._int_mm(a, a.T)


def test_more_memory_than_there_is():
    with card.memory_limit(card.device.allocated() + 1000), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2000, device="cuda")


def test_unbounded_retry(bench, layouts, monkeypatch):
    """Of a forward that finds no byte free, whatever earlier tests left on the card."""

    def starved(executor, *args, **kwargs):
        # 0 would be no limit.
        with card.memory_limit(1):
            return executor(*args, **kwargs)

    monkeypatch.setattr(policy.Policy, "remedies", lambda *_: itertools.repeat(None))
    model = bounded(planned(bench.load(layouts["bf16"]()))[0])
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.starved", starved)
    with pytest.raises(AssertionError, match="again"):
        bench.sample(model)


@dynamic
def test_deep_copy_of_a_vbar(bench, layouts):
    """The copy's end frees what the original still uses."""
    model = bench.load(layouts["bf16"]())
    bench.sample(model)
    vbar = next(iter(model.model.dynamic_vbars.values()))
    before = aimdo.counts[aimdo.FREED_BY_COPY]
    copied = copy.copy(vbar)
    del copied
    gc.collect()
    assert aimdo.counts[aimdo.FREED_BY_COPY] == before + 1
    # Else the check after every test finds what was planted.
    aimdo.counts[aimdo.FREED_BY_COPY] = before


@dynamic
def test_evicted_weights_are_gone(bench, layouts):
    model = bench.load(layouts["bf16"]())
    want = bench.sample(model)
    vbar = next(iter(model.model.dynamic_vbars.values()))
    address, size = next(iter(vbar.resident.items()))
    held = card.device.from_pointer(address, size)
    vbar.free_memory(1 << 40)
    assert held.view(torch.uint8).eq(255).all() and vbar.loaded_size() == 0
    # They come back when they are asked for.
    assert torch.equal(bench.sample(model), want)


def test_waits_are_told_with_their_place():
    x = torch.ones(3, device="cuda")
    with waits.watch() as seen:
        x.sum().item()
        torch.tensor([1.0, 2.0]).to("cuda")
        torch.tensor([1.0, 2.0]).pin_memory().to("cuda", non_blocking=True)
        x + x
    assert sorted((wait.kind, wait.what) for wait in seen) == [
        ("sync", "blocking copy from pageable host"), ("sync", "item"),
    ]  # fmt: skip
