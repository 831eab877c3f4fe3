"""GGUF's blocks against the public library's own formulas."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from frugal.kernels.checkpoints.header import TensorInfo
from frugal.kernels.checkpoints.packed import check_blocks, classify_blocks
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import gguf_blocks
from frugal.kernels.formats.gguf_blocks import TYPES, dequantise, largest
from frugal.kernels.formats.packed_int import PackedWeight
from frugal.tests.helpers import host_waits
from frugal.tests.helpers import wan as bed

pytestmark = pytest.mark.numeric

gguf = pytest.importorskip("gguf", reason="the library is the oracle")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def blocks(kind: str, rows: int = 24, per_row: int = 3, top: float = 1e-3, seed: int = 1):
    """Blocks of any bits but those of their 16-bit floats, which are between -top and top."""
    form, chance = TYPES[kind], np.random.default_rng(seed)
    raw = chance.integers(0, 256, (rows, per_row, form.size), dtype=np.uint8)
    for at in form.floats:
        floats = chance.uniform(-top, top, (rows, per_row, 1)).astype(np.float16)
        raw[..., at : at + 2] = floats.view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def theirs(raw: torch.Tensor, kind: str) -> torch.Tensor:
    made = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(made))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TYPES)
def test_values_are_the_librarys_rounded_once(kind, dtype, monkeypatch):
    form = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (form.values, form.size)
    raw = blocks(kind)
    meant = theirs(raw, kind)
    made = dequantise(raw, kind, dtype)
    assert made.shape == (24, 3 * form.values) and made.is_contiguous()
    assert torch.equal(made, meant.to(dtype))
    assert meant.unique().numel() > 100
    # A row at a time, and blocks that lie apart in memory.
    monkeypatch.setattr(gguf_blocks, "CPU_PIECE", 1)
    assert torch.equal(dequantise(raw, kind, dtype), made)
    apart = torch.cat((raw, raw), dim=1)[:, : raw.shape[1]]
    assert not apart.is_contiguous() and torch.equal(dequantise(apart, kind, dtype), made)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.endswith(("_0", "_1"))])
def test_weights_that_the_library_quantised(kind):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    raw = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    made = dequantise(torch.from_numpy(raw), kind, torch.float32)
    assert torch.equal(made, theirs(torch.from_numpy(raw), kind))
    assert bed.relative(made, weight) < (0.01 if kind == "Q8_0" else 0.1)


@pytest.mark.parametrize("kind", TYPES)
def test_no_piece_of_a_layer_makes_the_host_wait(kind, monkeypatch):
    raw = blocks(kind)
    monkeypatch.setattr(gguf_blocks, "CPU_PIECE", 1)
    with host_waits.counted() as seen:
        dequantise(raw, kind, torch.float16)
    assert not seen, seen


@pytest.mark.parametrize("kind", TYPES)
def test_one_graph_without_breaks(kind):
    torch._dynamo.reset()
    raw = blocks(kind)
    compiled = torch.compile(dequantise, backend="eager", fullgraph=True)
    assert torch.equal(compiled(raw, kind, torch.float16), dequantise(raw, kind, torch.float16))


def held(raw: torch.Tensor, kind: str, rows: int = 24) -> PackedWeight:
    width = raw.shape[1] // TYPES[kind].size * TYPES[kind].values
    info = TensorInfo(torch.uint8, (rows, width), blocks=kind)
    assert info.nbytes == raw.nbytes
    layout = classify_blocks("x: q", (rows, width), info, {})
    assert layout.packed is not None
    return PackedWeight(raw, None, None, None, layout.packed)


@pytest.mark.parametrize("kind", TYPES)
def test_values_that_a_type_cannot_hold(kind):
    raw = blocks(kind)
    top = float(theirs(raw, kind).abs().max())
    assert top <= largest(raw, kind) < 3 * top
    check_blocks("x: q", held(raw, kind), torch.float16)
    beyond = blocks(kind, top=6e4)
    check_blocks("x: q", held(beyond, kind), torch.float32)
    with pytest.raises(FrugalError, match=r"set weight_dtype to bf16.*beyond float16"):
        check_blocks("x: q", held(beyond, kind), torch.float16)
    for value in (np.nan, np.inf):
        for at in TYPES[kind].floats:
            bad = raw.clone()
            bad[5, at : at + 2] = torch.from_numpy(np.array([value], np.float16).view(np.uint8))
            with pytest.raises(FrugalError, match="values that are not finite"):
                check_blocks("x: q", held(bad, kind), torch.float32)


def test_tensors_beside_and_other_shapes_are_refused():
    info = TensorInfo(torch.uint8, (24, 96), blocks="Q8_0")
    scale = {"weight_scale": TensorInfo(torch.float32, ())}
    with pytest.raises(FrugalError, match=r"is GGUF Q8_0 \[24, 96\] with weight_scale"):
        classify_blocks("x: q", (24, 96), info, scale)
    with pytest.raises(FrugalError, match=r"of shape \[24, 96\]; expected \[96, 24\]"):
        classify_blocks("x: q", (96, 24), info, {})


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's counters")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ4_XS"])
def test_working_memory_is_bounded(kind):
    """Beyond the result, unpacking a large layer takes pieces only."""
    raw = blocks(kind, 4096, 4096 // TYPES[kind].values)
    dequantise(raw, kind, torch.float16)
    grown, out = bed.peak_memory(lambda: dequantise(raw, kind, torch.float16))
    assert grown <= out.nbytes + 40e6
