"""Attention over pages equals attention over one tensor; 8 bit pages stay inside their bounds."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.causal import offload, rotate, strategies
from frugal.kernels.causal.storage import (
    FP8,
    INT8,
    KINDS,
    MODEL,
    Page,
    PageFormat,
    check_finite,
    relative_error,
)
from frugal.kernels.errors import FrugalError

pytestmark = pytest.mark.numeric

SHAPE = (2, 12, 3, 16)


def values(seed, shape=SHAPE, dtype=torch.float32):
    """K or V with a few large numbers, as trained models have them."""
    make = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=make)
    rare = torch.rand(shape, generator=make) < 0.02
    return torch.where(rare, 8 * out, out).to(dtype)


def softmax_attention(q, k, v):
    """By definition, in float64."""
    q, k, v = (each.double().transpose(1, 2) for each in (q, k, v))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(12,), (5, 12), (1, 30, 7, 12)])
def test_merged_runs_are_softmax_attention(lengths):
    q = values(1)
    runs = [
        (3 * values(10 + i, (2, length, 3, 16)), values(20 + i, (2, length, 3, 16)))
        for i, length in enumerate(lengths)
    ]
    wanted = softmax_attention(q, *(torch.cat(part, 1) for part in zip(*runs, strict=True)))
    assert (strategies.merged(q, runs) - wanted).abs().max() < 2e-5
    # The order of the runs is of no account.
    assert (strategies.merged(q, runs[::-1]) - wanted).abs().max() < 2e-5
    if len(runs) > 1:
        assert (strategies.merged(q, runs[1:]) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((8, 6), torch.bfloat16, strategies.FLASH),
        ((7, 5), torch.float16, strategies.EFFICIENT),
        ((7, 5), torch.bfloat16, ""),
        ((12, 0), torch.float32, strategies.EFFICIENT),
        ((12, 0), torch.float64, ""),
    ],
)
def test_the_fused_kernel_that_a_card_gets(monkeypatch, capability, dtype, kernel):
    """The flash kernel of PyTorch raises on cards before Ampere."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert strategies.cuda_kernel(dtype, torch.device("cuda")) == kernel


def test_far_apart_runs_do_not_overflow():
    q, k, v = (values(seed) for seed in (1, 2, 3))
    runs = [(200 * k, v), (k, values(4))]
    wanted = softmax_attention(q, torch.cat([200 * k, k], 1), torch.cat([v, values(4)], 1))
    assert (strategies.merged(q, runs) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_keep_values_within_their_bound(kind, dtype):
    fmt = PageFormat(SHAPE, dtype, kind)
    k, v = values(1, dtype=dtype), 50 * values(2, dtype=dtype)
    page = fmt.empty(torch.device("cpu"))
    fmt.write(page, k, v)
    assert sum(t.nbytes for t in page.tensors().values()) == fmt.page_bytes
    out = torch.empty_like(k), torch.empty_like(v)
    fmt.read(page, torch.device("cpu"), *out)
    for held, exact in zip(out, (k, v), strict=True):
        if kind == MODEL:
            assert torch.equal(held, exact)
            continue
        exact = exact.float()
        amax = exact.abs().amax(dim=(1, 3), keepdim=True)
        bound = amax / 254 if kind == INT8 else torch.maximum(exact.abs() / 16, amax / 448 / 1024)
        rounding = exact.abs() * (0 if dtype == torch.float32 else 2**-8)
        assert ((held.float() - exact).abs() <= bound * 1.0001 + rounding).all()
        assert not torch.equal(held.float(), exact)
    measured = float(relative_error(fmt, page, k, v))
    assert measured == 0 if kind == MODEL else 1e-4 < measured < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_zeros_stays_zero(kind):
    fmt = PageFormat(SHAPE, torch.float32, kind)
    k = values(1)
    k[:, :, 1] = 0
    page = fmt.empty(torch.device("cpu"))
    fmt.write(page, k, k)
    out = torch.empty_like(k), torch.empty_like(k)
    fmt.read(page, torch.device("cpu"), *out)
    assert (out[0][:, :, 1] == 0).all()


def test_what_does_not_fit_a_page_is_refused():
    fmt = PageFormat(SHAPE, torch.float32, INT8)
    page = fmt.empty(torch.device("cpu"))
    with pytest.raises(FrugalError, match="one size"):
        fmt.write(page, values(1)[:, :6], values(1)[:, :6])
    with pytest.raises(FrugalError, match="one compute type"):
        fmt.write(page, values(1).half(), values(1).half())
    broken = values(1)
    broken[0, 0, 0, 0] = float("inf")
    with pytest.raises(FrugalError, match="not finite"):
        check_finite(float(fmt.write(page, broken, values(1))))
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(FrugalError, match="not finite"):
        check_finite(float(fmt.write(page, values(1), broken)))
    with pytest.raises(FrugalError, match="one of model, fp8, int8"):
        PageFormat(SHAPE, torch.float32, "int3")


@pytest.mark.parametrize("kind", [MODEL, FP8, INT8])
def test_to_main_memory_and_back_to_the_bit(kind):
    fmt, meta = PageFormat(SHAPE, torch.bfloat16, kind), torch.device("meta")
    page = fmt.empty(torch.device("cpu"))
    fmt.write(page, values(1, dtype=torch.bfloat16), values(2, dtype=torch.bfloat16))
    assert offload.to_host(page, offload.HostPages(fmt, torch.device("cuda"))) is page
    # A device that can be had everywhere: what comes from it has shape and type, and no values.
    there = offload.to_device(page, meta)
    assert isinstance(there, Page)
    assert {t.device.type for t in there.tensors().values()} == {"meta"}
    copy = Page(**{name: tensor.clone() for name, tensor in page.tensors().items()})
    pages = offload.HostPages(fmt, torch.device("cpu"))
    back = offload.to_device(offload.to_host(copy, pages), torch.device("cpu"))
    for name, tensor in page.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))


def test_memory_that_cannot_be_pinned_is_taken_all_the_same(monkeypatch):
    """What a system pins is less than what it has."""
    real = torch.empty

    def limited(*shape, pin_memory=False, **more):
        if pin_memory:
            raise torch.OutOfMemoryError("CUDA error: out of memory")
        return real(*shape, **more)

    monkeypatch.setattr(torch, "empty", limited)
    monkeypatch.setattr(offload, "pins", lambda device: True)
    fmt = PageFormat(SHAPE, torch.bfloat16, FP8)
    pages = offload.HostPages(fmt, torch.device("cuda"))
    page = pages.make()
    assert {t.device.type for t in page.tensors().values()} == {"cpu"}
    there = Page(page.k.to("meta"), page.v.to("meta"))
    with pytest.raises(NotImplementedError, match="no data"):
        # A place for it is there; only the values of this device are not.
        offload.to_host(there, pages)


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_pages_take_what_they_hold(kind, monkeypatch):
    """torch's pinned memory comes in powers of two, each kept for another block of its size."""
    real, asked = torch.empty, []

    def pinned(*shape, pin_memory=False, **more):
        made = real(*shape, **more)
        if pin_memory:
            asked.append(1 << (made.nbytes - 1).bit_length())
        return made

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(offload, "pins", lambda device: True)
    # No power of two, as at 832 x 480.
    fmt = PageFormat((1, 39, 3, 40), torch.bfloat16, kind)
    pages = offload.HostPages(fmt, torch.device("cuda"))
    made = [pages.make() for _ in range(100)]
    assert sum(asked) == pages.held_bytes and len(set(asked)) == 1
    # At most a part in 16 of each block, 64 bytes per tensor, and the rest of the last block.
    held = 100 * (fmt.page_bytes + 4 * offload.ALIGNED)
    assert sum(asked) <= held * 17 / 16 + asked[0]
    g = torch.Generator().manual_seed(1)
    written = [torch.randn(2, *fmt.shape, generator=g).bfloat16() for _ in made]
    for page, (k, v) in zip(made, written, strict=True):
        fmt.write(page, k, v)
    lone = fmt.empty(torch.device("cpu"))
    for page, (k, v) in zip(made, written, strict=True):
        fmt.write(lone, k, v)
        for name, tensor in lone.tensors().items():
            assert torch.equal(page.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))
    # A block goes with its last page; a page that stays keeps one.
    first = made[0]
    del made, page
    assert pages.held_bytes <= 2 * pages.block_bytes
    fmt.write(lone, *written[0])
    assert torch.equal(first.v.view(torch.uint8), lone.v.view(torch.uint8)) and len(asked) > 2


def roped(k, time):
    """The time part of Wan's RoPE by complex numbers, in float64."""
    axis = k.shape[-1] - 4 * (k.shape[-1] // 6)
    pairs = torch.view_as_complex(k[..., :axis].double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.exp(1j * time * 10000.0 ** (-torch.arange(0, axis, 2).double() / axis))
    return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), k[..., axis:].double()], -1)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("stored", "wanted"), [(0, 5), (9, 4), (40, 3)])
def test_a_shifted_key_is_the_key_of_that_time(width, stored, wanted):
    k = values(1, (1, 6, 2, width))
    moved = rotate.shifted(roped(k, stored).float(), wanted - stored)
    assert (moved - roped(k, wanted)).abs().max() < 2e-5
    assert (moved - roped(k, stored)).abs().max() > 0.1
