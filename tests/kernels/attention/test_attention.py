"""Each attention backend against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.attention import attention
from frugal.kernels.attention.backends import BACKENDS
from frugal.kernels.attention.call import describe
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers.attention import by_rows, mask_of, off, tensors

pytestmark = pytest.mark.numeric

ON_CPU = [each for each in BACKENDS if "cpu" in each.devices or not each.devices]
MASKS = ["none", "bool2", "bool3", "bool4", "add2", "add3", "add4"]


@pytest.mark.parametrize("width", [40, 80, 128, 160])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", [each.name for each in ON_CPU])
def test_backend_is_attention(name, kind, kv_heads, width):
    backend = next(each for each in BACKENDS if each.name == name)
    dtype = torch.float32 if torch.float32 in backend.dtypes or not backend.dtypes else None
    q, k, v = tensors(Hkv=kv_heads, D=width, dtype=dtype or torch.bfloat16)
    mask, scale = mask_of(kind), 0.3 if width == 80 else None
    if backend.refusal(describe(q, k, v, mask)) is not None:
        with pytest.raises(FrugalError, match=name):
            attention(q, k, v, mask, scale, backend=name)
        return
    found = attention(q, k, v, mask, scale, backend=name)
    want = by_rows(q, k, v, mask, width**-0.5 if scale is None else scale)
    assert found.dtype == q.dtype
    assert off(found, want) < (1e-6 if dtype else 6e-3)


@pytest.mark.parametrize("name", ["torch", "torch-math", "chunked"])
def test_a_row_without_keys_is_zero(name):
    q, k, v = tensors()
    mask = torch.ones(9, 13, dtype=torch.bool)
    mask[4] = False
    found = attention(q, k, v, mask, backend=name)
    assert torch.equal(found[:, :, 4], torch.zeros_like(found[:, :, 4]))
    assert off(found, by_rows(q, k, v, mask, 40**-0.5)) < 1e-6


def test_chunks_join(monkeypatch):
    from frugal.kernels.attention import eager

    q, k, v = tensors(Lq=50, Lk=31)
    monkeypatch.setattr(eager, "SCORE_BYTES", 7 * 31 * 4)
    mask = mask_of("add4", Lq=50, Lk=31)
    assert off(attention(q, k, v, mask, backend="chunked"), by_rows(q, k, v, mask, 40**-0.5)) < 1e-6
