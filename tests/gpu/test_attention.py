"""Attention kernels on an NVIDIA GPU: every one that is there, against float64, and the choice."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.attention import KernelSelector, attention, check
from frugal.kernels.attention.backends import BACKENDS
from frugal.kernels.attention.call import describe
from frugal.kernels.attention.call_report import table
from frugal.kernels.attention.measure import measure
from frugal.kernels.errors import FrugalError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.cuda is None, reason="needs an NVIDIA GPU"
    ),
]
# Names, not backends: a test's name must not change with what is installed.
NAMES = [each.name for each in BACKENDS]
# (heads, tokens, keys, width): Wan self and text attention, CatVTON's levels at 384 x 512.
SHAPES = [(4, 4096, 4096, 128), (4, 4096, 512, 128), (8, 6144, 6144, 40), (8, 1536, 1536, 80)]


def tensors(heads, q_len, k_len, width, dtype=torch.bfloat16, kv_heads=None):
    g = torch.Generator("cuda").manual_seed(0)
    kv = (1, kv_heads or heads, k_len, width)
    return [
        torch.randn(shape, generator=g, device="cuda").to(dtype)
        for shape in ((1, heads, q_len, width), kv, kv)
    ]


def rows_in_float64(q, k, v, rows, mask=None):
    """The given query rows of attention, in float64 throughout."""
    groups = q.shape[1] // k.shape[1]
    k, v = (each.double().repeat_interleave(groups, 1) for each in (k, v))
    scores = q[:, :, rows].double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[..., rows, :], -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_against_float64(name, shape):
    backend = next(each for each in BACKENDS if each.name == name)
    q, k, v = tensors(*shape)
    call = describe(q, k, v, None, lossy=True)
    why = backend.absent("cuda") or backend.refusal(call)
    if why is not None:
        pytest.skip(f"{name} {why}")
    before = check.fingerprint(q, k, v)
    try:
        out = attention(q, k, v, backend=name)
    except Exception as error:
        # PyTorch's kernels say only when asked; the choice turns them down the same way.
        assert name in measure([backend], q, k, v, None, shape[3] ** -0.5).refused
        pytest.skip(f"{name} raised {type(error).__name__}: {str(error)[:80]}")
    assert check.fingerprint(q, k, v) == before
    rows = torch.linspace(0, shape[1] - 1, 256, device="cuda").long()
    want = rows_in_float64(q, k, v, rows)
    off = (out[:, :, rows].double() - want).norm() / want.norm()
    assert float(off) < check.limit(q.dtype, backend.exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_auto_is_right(dtype, kv_heads, masked):
    q, k, v = tensors(8, 1500, 1500, 80, dtype, kv_heads)
    mask = None
    if masked:
        mask = torch.rand(1, 1, 1500, 1500, device="cuda") > 0.5
    chooser = KernelSelector(torch.device("cuda"))
    out = chooser.attend(q, k, v, mask)
    rows = torch.arange(0, 1500, 7, device="cuda")
    want = rows_in_float64(q, k, v, rows, mask)
    off = (out[:, :, rows].double() - want).norm() / want.norm()
    assert float(off) < check.limit(dtype, True)
    (row,) = table(chooser).rows
    assert row.ms > 0 and row.tflops > 0
    ranking = next(iter(chooser.fresh.values())).ranking
    assert row.backend == ranking[0][0] and len(ranking) >= 3


def test_calls_do_not_wait_for_the_device():
    q, k, v = tensors(8, 2048, 2048, 128)
    chooser = KernelSelector(torch.device("cuda"))
    chooser.attend(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            chooser.attend(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_no_graph_break_on_the_device():
    q, k, v = tensors(8, 2048, 2048, 128)
    chooser = KernelSelector(torch.device("cuda"))
    explained = torch._dynamo.explain(lambda *a: chooser.attend(*a) * 2)(q, k, v)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_a_kernel_for_another_card_says_so():
    q, k, v = tensors(8, 256, 256, 128)
    major = torch.cuda.get_device_capability()[0]
    wrong = "flash-attn-3" if major != 9 else "torch-upcast"
    with pytest.raises(FrugalError, match=wrong):
        attention(q, k, v, backend=wrong)
