"""Formats: exact sizes, decoders against comfy-kitchen's own, edges of the number ranges."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, per_channel, table
from frugal.kernels.quantize.calibration import statistics_of
from frugal.tests.helpers import wan as bed

kitchen = pytest.importorskip("comfy_kitchen.tensor")
QUANTISED = [target for target in table.TARGETS if target != table.BF16]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Relative error of Gaussian weights; each format must be near its own, not only below the next.
EXPECTED = {
    table.BF16: (0.0, 1e-9), table.FP8: (0.02, 0.03), table.INT8: (0.005, 0.01),
    table.W4A8: (0.06, 0.08), table.W4A8_G64: (0.08, 0.1), table.AWQ: (0.08, 0.1),
}  # fmt: skip


def weight(rows=96, width=256, seed=1, dtype=torch.bfloat16):
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return (0.05 * noise).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(table.TARGETS), st.integers(1, 9), st.integers(1, 5), st.sampled_from(FLOATS)
)
def test_leaves_are_what_is_encoded(target, rows, groups, dtype):
    shape = (rows, 64 * groups)
    made = codec.encode(target, weight(*shape, dtype=dtype), "cpu")
    told = table.tensor_specs(target, shape, dtype=dtype)
    assert list(made) == list(told)
    for suffix, (kind, size) in told.items():
        assert (made[suffix].dtype, tuple(made[suffix].shape)) == (kind, size), suffix
    size = sum(tensor.nbytes for tensor in made.values())
    assert size == table.stored_bytes(target, shape)
    if target != table.BF16:
        assert size % 8 == 0
        text = bytes(made["comfy_quant"].tolist())
        assert json.loads(text) == table.options(target, shape)
        assert torch.equal(made["comfy_quant"], table.declaration(target, shape))


@pytest.mark.parametrize("target", table.TARGETS)
def test_decoded_is_near_whatever_the_pieces(target, monkeypatch):
    exact = weight()
    made = codec.encode(target, exact, "cpu")
    got = codec.decode(target, made, None, tuple(exact.shape))
    low, high = EXPECTED[target]
    assert low <= bed.relative(got, exact) <= high
    held = {suffix: tensor.clone() for suffix, tensor in made.items()}
    for module in (codec, per_channel):
        monkeypatch.setattr(module, "PIECE", 1000)
    pieces = codec.encode(target, exact, "cpu")
    # Products of few rows add up in another order, which turns a code over here and there.
    assert bed.relative(codec.decode(target, pieces, None, tuple(exact.shape)), got) < 2e-3
    assert torch.allclose(codec.decode(target, made, None, tuple(exact.shape)), got, atol=1e-6)
    assert all(torch.equal(held[suffix].float(), made[suffix].float()) for suffix in made)


@pytest.mark.parametrize("target", QUANTISED)
def test_comfy_kitchen_decodes_the_same(target):
    exact = weight(dtype=torch.float32)
    shape = tuple(exact.shape)
    made = codec.encode(target, exact, "cpu")
    chosen = table.options(target, shape)
    common = {"orig_dtype": torch.float32, "orig_shape": shape}
    settings = {key: chosen[key] for key in ("group_size", "convrot_groupsize") if key in chosen}
    scale = made.get("weight_scale")
    if target == table.FP8:
        form = kitchen.TensorCoreFP8Layout
        params = form.Params(scale=scale, **common)
    elif target == table.INT8:
        form = kitchen.TensorWiseINT8Layout
        params = form.Params(scale=scale, convrot=True, **settings, **common)
    elif target == table.AWQ:
        form = pytest.importorskip("comfy_kitchen.tensor.awq_w4a16").TensorCoreAWQW4A16Layout
        floats = {"scale": scale.float(), "zeros": made["weight_zeros"].float()}
        params = form.Params(**floats, **settings, **common)
    else:
        form = kitchen.AsymW4A8Int8Layout
        params = form.Params(
            scale=made["weight_s_rel"],
            s_channel=made["weight_s_channel"],
            codebook=made["weight_codebook"],
            **settings,
            **common,
        )
    theirs = form.dequantize(made["weight"], params)
    assert torch.allclose(codec.decode(target, made, None, shape), theirs, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_awq_codes_are_the_nearest(dtype):
    """Every value sits on the nearest of its group's 16 levels, as stored."""
    exact = weight(8, 128, dtype=dtype)
    made = codec.encode(table.AWQ, exact, "cpu")
    scale, zero = (made[f"weight_{suffix}"].float().t() for suffix in ("scale", "zeros"))
    levels = (torch.arange(16) - 8) * scale[..., None] + zero[..., None]
    grouped = exact.float().reshape(8, 2, 64)
    best = (grouped[..., None] - levels[:, :, None, :]).abs().amin(dim=3)
    got = codec.decode(table.AWQ, made, None, (8, 128)).reshape(8, 2, 64)
    assert torch.allclose((got - grouped).abs(), best, atol=1e-7)
    assert made["weight_scale"].dtype == table.half(dtype)


@pytest.mark.parametrize("target", table.TARGETS)
def test_zero_and_constant_rows_stay(target):
    exact = weight(8, 128, dtype=torch.float32)
    exact[2], exact[5] = 0, 0.25
    made = codec.encode(target, exact, "cpu")
    got = codec.decode(target, made, None, (8, 128))
    assert bool(torch.isfinite(got).all())
    assert float(got[2].abs().max()) < 1e-6
    assert bed.relative(got[5], exact[5]) < 0.1
    nothing = codec.encode(target, torch.zeros(4, 128), "cpu")
    assert float(codec.decode(target, nothing, None, (4, 128)).abs().max()) < 1e-6


@pytest.mark.parametrize("target", table.TARGETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(target, bad):
    broken = weight(4, 64)
    broken[1, 3] = bad
    with pytest.raises(FrugalError, match="wan: x holds a weight that is not finite"):
        codec.encode(target, broken, "cpu", where="wan: x")


def test_weight_beyond_bf16():
    """The largest float32 numbers round to infinity."""
    large = torch.full((2, 64), torch.finfo(torch.float32).max)
    with pytest.raises(FrugalError, match="holds a weight beyond bfloat16"):
        codec.encode(table.BF16, large, "cpu")


@pytest.mark.parametrize("target", QUANTISED)
def test_widths(target):
    fits = {table.FP8: 1, table.INT8: 16, table.W4A8: 16}.get(target, 64)
    for width in (72, 80, 100, 128, 320, 8960):
        reason = table.suits(target, (4, width))
        assert (reason is None) == (width % fits == 0), width
        if reason:
            with pytest.raises(FrugalError, match=f"it has {width} inputs"):
                table.options(target, (4, width))
    assert table.suits(target, (4, 4, 64)) == "it has 3 dimensions, not 2"
    rotation = table.options(target, (4, 320)).get("convrot_groupsize", 64)
    assert rotation == 64


def test_unknown_target_and_settings():
    with pytest.raises(FrugalError, match="the format 'int3'"):
        table.options("int3", (4, 64))
    with pytest.raises(FrugalError, match="settings among"):
        codec.encode(table.INT8, weight(4, 64), "cpu", {"group": 3})


@pytest.mark.parametrize("target", QUANTISED)
def test_statistics_lower_the_error_of_the_output(target):
    make = torch.Generator().manual_seed(2)
    inputs = torch.randn(600, 128, generator=make) @ torch.randn(128, 128, generator=make)
    inputs[:, 5] *= 20
    exact = weight(64, 128, dtype=torch.float32)
    errors = []
    for known in (None, statistics_of("x", inputs)):
        made = codec.encode(target, exact, "cpu", statistics=known)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in made.items()} == table.tensor_specs(
            target, (64, 128), dtype=torch.float32
        )
        got = codec.decode(target, made, None, (64, 128))
        errors.append(bed.relative(inputs @ got.t(), inputs @ exact.t()))
    assert errors[1] < (0.95 if target in (table.FP8, table.INT8) else 0.7) * errors[0]
