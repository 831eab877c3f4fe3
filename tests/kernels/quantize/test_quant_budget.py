"""A format per layer under a budget: against brute force, uniform formats and name lists."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import table
from frugal.kernels.quantize import budget as module
from frugal.kernels.quantize.budget import allocate, frontier
from frugal.kernels.quantize.curves import FormatError, LayerCurve
from frugal.kernels.quantize.sensitivity import for_outputs, probe, wiring

NAMED = (table.BF16, table.FP8, table.INT8, table.W4A8)


def curve(name: str, rows: dict[str, tuple[int, float]]) -> LayerCurve:
    made = {target: FormatError(size, error, 1.0, 1.0) for target, (size, error) in rows.items()}
    return LayerCurve(name, (64, 64), made, {}, False)


def wan_like(blocks: int, seed: int, dim: int = 256) -> dict[str, LayerCurve]:
    """Curves with real sizes and errors that scatter around those of the formats."""
    draw = np.random.default_rng(seed)
    typical = dict(zip(table.TARGETS, (0, 0.026, 0.006, 0.07, 0.085, 0.1), strict=True))
    shapes = {"head.head": (64, dim), "time_projection.1": (6 * dim, dim)}
    for place in range(blocks):
        shapes |= {f"blocks.{place}.self_attn.{suffix}": (dim, dim) for suffix in "qkvo"}
        shapes[f"blocks.{place}.ffn.0"] = (3 * dim, dim)
        shapes[f"blocks.{place}.ffn.2"] = (dim, 3 * dim)
    curves = {}
    for name, shape in shapes.items():
        hard = math.exp(draw.normal(0, 0.5))
        made = {}
        for target, error in typical.items():
            noise = (error * hard) ** 2 * math.exp(draw.normal(0, 0.2))
            made[target] = FormatError(table.stored_bytes(target, shape), noise, 1.0, 1.0)
        curves[name] = LayerCurve(name, shape, made, {}, True)
    return curves


def totals(curves, choice, importance=None) -> tuple[int, float]:
    size, error = 0, 0.0
    for name, target in choice.items():
        made = curves[name].formats[target]
        size += made.bytes
        error += (1 if importance is None else importance[name]) * made.noise / made.signal
    return size, error


@st.composite
def small_curves(draw):
    """Up to 5 layers with up to 4 formats, sizes and errors in any order, equal ones among them."""
    curves = {}
    for place in range(draw(st.integers(1, 5))):
        targets = draw(st.lists(st.sampled_from(NAMED), min_size=1, max_size=4, unique=True))
        rows = {
            target: (draw(st.integers(1, 40)), draw(st.sampled_from((0, 1, 2, 3, 5, 8, 13))) / 7)
            for target in targets
        }
        curves[f"layer{place}"] = curve(f"layer{place}", rows)
    return curves


def brute_force(curves, fixed, budget) -> tuple[float, int] | None:
    found = []
    for targets in itertools.product(*(one.formats for one in curves.values())):
        size, error = totals(curves, dict(zip(curves, targets, strict=True)))
        if fixed + size <= budget:
            found.append((error, fixed + size))
    return min(found, default=None)


@settings(max_examples=200, deadline=None)
@given(small_curves(), st.integers(0, 50), st.integers(1, 250), st.sampled_from((2, 5, 1 << 16)))
def test_equal_to_brute_force(curves, fixed, budget, most):
    """With a frontier that is not thinned; a thinned one keeps its promises and no more."""
    kept, module.MOST_STATES = module.MOST_STATES, most
    try:
        swept = frontier(curves, fixed)
    finally:
        module.MOST_STATES = kept
    best = brute_force(curves, fixed, budget)
    if best is None:
        with pytest.raises(FrugalError, match=str(swept.smallest)):
            swept.at(budget)
        return
    found = swept.at(budget)
    size, error = totals(curves, found.choice)
    assert (found.bytes, found.error) == (fixed + size, error)
    assert found.bytes <= budget
    assert found.bound <= best[0] + 1e-12 <= found.error + 2e-12
    if found.exact:
        assert (found.error, found.bytes) == best and found.gap == 0
    else:
        assert most < 1 << 16
    smaller = [swept.at(size).error for size in range(swept.smallest, budget)]
    assert all(found.error <= error for error in smaller)
    for target in NAMED:
        if all(target in one.formats for one in curves.values()):
            size, error = totals(curves, dict.fromkeys(curves, target))
            assert found.error <= error or fixed + size > budget


@pytest.mark.parametrize("seed", range(3))
def test_uniform_formats_and_name_lists_lose(seed):
    """Each mix gives the budget that the allocator then has to use better."""
    curves = wan_like(12, seed)
    importance = wiring(curves)
    swept = frontier(curves, 1000, importance=importance)
    mixes = [dict.fromkeys(curves, target) for target in table.TARGETS]
    for few, many in itertools.permutations(table.TARGETS, 2):
        for edge in (0, 1, 3):
            ends = [f"blocks.{place}." for place in (*range(edge), *range(12 - edge, 12))]
            mixes.append(
                {
                    name: few
                    if not name.startswith("blocks") or name.startswith(tuple(ends))
                    else many
                    for name in curves
                }
            )
        for part in ("ffn.0", "ffn.2", "self_attn.v", "self_attn.o"):
            mixes.append({name: few if name.endswith(part) else many for name in curves})
    better = 0
    for mix in mixes:
        size, error = totals(curves, mix, importance)
        found = swept.at(1000 + size)
        assert found.bytes <= 1000 + size
        assert found.error <= error * (1 + 1e-12)
        better += found.error < 0.99 * error
    assert better > len(mixes) / 2


def test_larger_budgets_never_err_more_even_when_thinned(monkeypatch):
    monkeypatch.setattr(module, "MOST_STATES", 64)
    curves = wan_like(12, 5)
    swept = frontier(curves, 0)
    assert not swept.exact
    steps = np.linspace(swept.smallest, swept.largest + 10, 400).astype(int)
    found = [swept.at(int(size)) for size in steps]
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    monkeypatch.undo()
    exact = frontier(curves, 0)
    assert exact.exact
    for size, one in zip(steps, found, strict=True):
        best = exact.at(int(size)).error
        assert one.bound <= best <= one.error
        assert one.error * (1 - one.gap) <= best + 1e-15
        assert "search was thinned" in one.notes[-1]
        for target in table.TARGETS:
            uniform, error = totals(curves, dict.fromkeys(curves, target))
            assert one.error <= error or uniform > size


def test_same_answer_twice_and_in_any_order_of_formats():
    curves = wan_like(4, 7)
    shuffled = {
        name: LayerCurve(
            name, one.shape, dict(reversed(one.formats.items())), one.refused, one.calibrated
        )
        for name, one in curves.items()
    }
    middle = sum(one.formats[table.INT8].bytes for one in curves.values())
    first = allocate(curves, 0, middle)
    assert first == allocate(curves, 0, middle) == allocate(shuffled, 0, middle)


def test_equal_errors_take_the_smaller_format():
    rows = {table.BF16: (100, 0.0), table.INT8: (50, 0.0)}
    found = allocate({"a": curve("a", rows), "b": curve("b", rows)}, 3, 10**9)
    assert found.choice == {"a": table.INT8, "b": table.INT8} and found.bytes == 103
    assert "budget of 1.000 GB is not needed" in found.notes[0]


def test_importance_moves_bytes():
    rows = {table.BF16: (100, 0.0), table.W4A8: (25, 0.01)}
    curves = {name: curve(name, rows) for name in ("a", "b")}
    for heavy in curves:
        found = allocate(curves, 0, 125, importance={"a": 1.0, "b": 1.0} | {heavy: 3.0})
        assert found.choice[heavy] == table.BF16
        assert found.error == pytest.approx(0.01)


def test_wiring_by_hand():
    names = [f"blocks.{place}.{part}" for place in range(4) for part in ("self_attn.q", "ffn.2")]
    names += ["head.head", "time_projection.1", "text_embedding.0", "vace_blocks.0.after_proj"]
    shares = wiring([*names, "vace_blocks.0.ffn.0"])
    assert shares["blocks.3.ffn.2"] == shares["vace_blocks.0.ffn.0"] == 1 / 15
    assert shares["vace_blocks.0.after_proj"] == 3 / 15
    assert shares["head.head"] == shares["time_projection.1"] == 1
    assert shares["text_embedding.0"] == 1 / 3


def test_too_small_names_the_size_and_the_formats():
    curves = wan_like(2, 1)
    allowed = (table.BF16, table.INT8)
    least = 500 + totals(curves, dict.fromkeys(curves, table.INT8))[0]
    assert frontier(curves, 500, allowed).smallest == least
    with pytest.raises(
        FrugalError, match=rf"allow fp8 or W4A8 or.*\({least} bytes\) or more"
    ) as at:
        allocate(curves, 500, least - 1, allowed)
    assert "raise the budget" in str(at.value)
    four_bit = 500 + totals(curves, dict.fromkeys(curves, table.W4A8_G64))[0]
    with pytest.raises(
        FrugalError, match=r"raise the budget to at least 0.00\d GB, or to 0.001"
    ) as at:
        allocate(curves, 500, four_bit - 1, allowed)
    assert allocate(curves, 500, least, allowed).bytes == least


def test_refusals():
    curves = wan_like(1, 1)
    with pytest.raises(FrugalError, match="formats allowed: 'int3'"):
        frontier(curves, 0, ("int3",))
    with pytest.raises(FrugalError, match="formats allowed: 'none'"):
        frontier(curves, 0, ())
    with pytest.raises(FrugalError, match="no layer"):
        frontier({}, 0)
    with pytest.raises(FrugalError, match="no importance for head"):
        frontier(curves, 0, importance={"a": 1.0})
    for bad in (math.nan, -1.0, math.inf):
        with pytest.raises(FrugalError, match="finite numbers"):
            frontier(curves, 0, importance=dict.fromkeys(curves, bad))
    only = {table.BF16: FormatError(8, 0.0, 1.0, 1.0)}
    with pytest.raises(FrugalError, match="a was not measured in fp8"):
        frontier({"a": LayerCurve("a", (2, 2), only, {}, False)}, 0, (table.FP8,))
    narrow = LayerCurve("a", (2, 20), {}, {table.INT8: "it has 20 inputs"}, False)
    with pytest.raises(FrugalError, match=r"a fits none .*int8 ConvRot: it has 20 inputs"):
        frontier({"a": narrow}, 0, (table.INT8,))


def test_probe_finds_known_shares():
    """The sum of three layers with gains 1, 2 and 0 on white inputs: shares 1/5, 4/5 and 0."""
    make = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(96, 64, generator=make) for name in "abc"}
    inputs = torch.randn(500, 3, 64, generator=make)
    asked = []

    def run(differences):
        asked.append(tuple(differences))
        parts = [
            gain * inputs[:, place] @ (weights[name] + differences.get(name, 0)).T
            for place, (name, gain) in enumerate(zip("abc", (1, 2, 0), strict=True))
        ]
        return sum(parts)

    steps = []
    readers = [(name, lambda name=name: weights[name]) for name in "abc"]
    found = probe(readers, run, step=steps.append)
    assert asked == [(), ("a",), ("b",), ("c",)] and steps == list("abc")
    assert found["a"] == pytest.approx(0.2, rel=0.1)
    assert found["b"] == pytest.approx(0.8, rel=0.1)
    assert found["c"] == 0
    assert found == probe(readers, run)
    curves = {name: curve(name, {table.INT8: (1, 0.1)}) for name in "abc"}
    assert for_outputs(found, curves) == found
    curves["a"] = LayerCurve("a", (96, 64), {}, {}, True, white=2.0)
    assert for_outputs(found, curves)["a"] == found["a"] / 2
    with pytest.raises(FrugalError, match="finite outputs that are not zero"):
        probe(readers, lambda differences: torch.zeros(3))
