"""fp8 products against their formula, and the plan of products: who gets what, who is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from frugal.kernels.checkpoints.layouts import LayerLayout
from frugal.kernels.checkpoints.matmul_precision import AUTO, FULL, LOW, plan_matmul
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import fp8_linear as fp8

pytestmark = pytest.mark.numeric

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def given(dtype=E4, rows=True, seed=1):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 64, generator=make)
    # Tokens of very different size, one above 448: a fixed scale would cut or lose them.
    x *= torch.tensor([1e-4, 1.0, 30.0, 1e4, 1.0])[None, :, None]
    weight = torch.randn(48, 64, generator=make).to(dtype)
    scale = 0.01 + torch.rand(48, 1, generator=make) if rows else torch.tensor(0.03)
    return x, weight, scale, torch.randn(48, generator=make)


def by_hand(x, weight, scale, bias):
    """The formula in float64, value by value rounded as e4m3 rounds."""
    flat = x.reshape(-1, x.shape[-1]).double()
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=torch.float64)
    for number, token in enumerate(flat):
        size = token.abs().max().float() / 448
        rounded = (token.float() / size).to(E4).double()
        out[number] = size.double() * (weight.double() @ rounded)
    return (out * scale.double().reshape(1, -1) + bias.double()).reshape(*x.shape[:-1], -1)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("rows", [True, False], ids=["per row", "per tensor"])
@pytest.mark.parametrize("dtype", [E4, E5])
def test_reference_is_the_formula(dtype, rows):
    x, weight, scale, bias = given(dtype, rows)
    out = fp8.fp8_linear(x, weight, scale, bias)
    expected = by_hand(x, weight, scale, bias)
    assert out.shape == (2, 5, 48) and out.dtype == x.dtype
    for token in range(5):
        assert relative(out[:, token], expected[:, token]) <= 1e-6
    # And it is an approximation of the float product, token by token, whatever their size.
    exact = x.double() @ (weight.double() * scale.double().reshape(-1, 1)).t()
    for token in range(5):
        error = relative(out[:, token].double() - bias, exact[:, token])
        assert 1e-3 < error < 0.06, token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [True, False], ids=["per row", "per tensor"])
def test_scaled_mm_agrees_with_the_reference(rows, dtype):
    x, weight, scale, bias = given(E4, rows)
    x = x.clamp(-100, 100).to(dtype)
    product = fp8.scales_outside
    try:
        out = fp8.fp8_linear(x, weight, scale, bias.to(dtype), product)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no such product on the CPU: {error}")
    expected = fp8.fp8_linear(x, weight, scale, bias.to(dtype))
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative(out, expected) <= tolerance


def test_rounding_in_pieces_is_rounding_at_once(monkeypatch):
    x = given()[0].reshape(-1, 64)
    whole = fp8.round_tokens(x)
    monkeypatch.setattr(fp8, "PIECE", 128)
    for a, b in zip(whole, fp8.round_tokens(x), strict=True):
        assert torch.equal(a.float(), b.float())
    values, scales = fp8.round_tokens(torch.zeros(3, 64))
    assert not values.float().any() and torch.isfinite(scales).all()
    bad = torch.ones(2, 64)
    bad[0, 3] = float("nan")
    out = fp8.fp8_linear(bad, *given()[1:])
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


def test_choice_takes_what_agrees_and_gives_every_reason(monkeypatch):
    device = torch.device("cpu")

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")

    def wrong(tokens, token_scale, weight, scale, dtype):
        return fp8.reference(tokens, token_scale, weight, scale.flip(0), dtype)

    monkeypatch.setattr(fp8, "scales_inside", broken)
    monkeypatch.setattr(fp8, "scales_outside", fp8.reference)
    assert fp8.choose(device, E4) == ("scales outside", fp8.reference)
    monkeypatch.setattr(fp8, "scales_outside", wrong)
    with pytest.raises(FrugalError, match=r"inside: no such kernel; scales outside: off by 0\.\d"):
        fp8.choose(device, E4)


def plan(**layers) -> Any:
    made = {name: LayerLayout(form) for name, form in layers.items()}
    return SimpleNamespace(file="wan.safetensors", layers=made)


FP8 = {"a": "float8_e4m3fn", "b": "float8_e5m2"}
INT8 = {"c": "int8_tensorwise", "d": "asym_w4a8_int8", "e": "convrot_w4a4"}
BLOCKS = {"f": "nvfp4", "g": "mxfp8"}
PACKED = {"h": "gptq", "i": "awq"}
NEW = (12, 0)


def test_auto_changes_nothing_and_says_why():
    found = plan_matmul(plan(**FP8, **INT8, **BLOCKS, **PACKED), AUTO, (8, 6), "cuda:0")
    assert not found.expanded and not found.float8
    text = "\n".join(found.notes)
    assert "float8_e4m3fn layers multiply in full precision" in text
    assert "int8_tensorwise layers multiply as integers" in text
    assert "nvfp4 layers are expanded (this device: 8.6, needed: 10.0)" in text
    assert plan_matmul(plan(), AUTO, None, "cpu").notes == ()


def test_full_precision_takes_every_layer_that_would_round():
    found = plan_matmul(plan(**FP8, **INT8, **BLOCKS, **PACKED), FULL, NEW, "cuda:0")
    assert set(found.expanded) == {*INT8, *BLOCKS} and not found.float8
    assert "5 layers are expanded one at a time" in found.notes[0]
    assert "do anyway" in plan_matmul(plan(**FP8), FULL, None, "cpu").notes[0]


def test_low_precision_takes_fp8_layers():
    found = plan_matmul(plan(**FP8, **INT8, **PACKED), LOW, (8, 9), "cuda:0")
    assert set(found.float8) == set(FP8) and not found.expanded
    text = "\n".join(found.notes)
    assert "cuda:0 has 8.9" in text and "2 layers have no low-precision product" in text


@pytest.mark.parametrize(
    ("layers", "capability", "says"),
    [
        (FP8, None, r"1 layers in float8_e4m3fn, and cuda:0 has none; .*capability 8\.9 or newer"),
        (FP8, (8, 6), r"has 8\.6; expected compute capability 8\.9"),
        (INT8, (7, 0), r"int8_tensorwise, and cuda:0 has 7\.0; .*7\.5"),
        (BLOCKS, (9, 0), r"nvfp4, and cuda:0 has 9\.0; .*10\.0"),
        (BLOCKS, None, r"10\.0"),
        (PACKED, NEW, "gptq, awq, which has no low-precision product"),
        ({}, NEW, "no quantised layer"),
    ],
)
def test_low_precision_is_refused_with_the_capability_it_needs(layers, capability, says):
    with pytest.raises(FrugalError, match=says):
        plan_matmul(plan(**layers), LOW, capability, "cuda:0")


def test_integers_run_in_low_precision_on_the_cpu():
    assert plan_matmul(plan(**INT8), LOW, None, "cpu").notes
    with pytest.raises(FrugalError, match="one of auto, full precision, low precision"):
        plan_matmul(plan(**INT8), "fast", None, "cpu")


def test_block_scales_stay_in_full_precision():
    block = LayerLayout("float8_e4m3fn", grid="block")
    mixed = SimpleNamespace(file="wan", layers={"a": LayerLayout("float8_e4m3fn"), "b": block})
    found = plan_matmul(mixed, LOW, (8, 9), "cuda:0")
    assert found.float8 == ("a",)
    assert "1 layers in float8_e4m3fn multiply" in found.notes[0]
    assert "1 fp8 layers with a scale per block stay in full precision" in found.notes[1]
    only = SimpleNamespace(file="wan", layers={"b": block})
    with pytest.raises(FrugalError, match="a scale per block, which has no low-precision product"):
        plan_matmul(only, LOW, None, "cpu")
