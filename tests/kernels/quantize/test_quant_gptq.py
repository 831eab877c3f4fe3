"""GPTQ and scale search on the grids of ComfyUI's formats."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, rotation, table
from frugal.kernels.quantize import clip, gptq, grids
from frugal.kernels.quantize.calibration import from_hessian, statistics_of
from frugal.kernels.quantize.curves import layer_curve
from frugal.tests.helpers import rounding
from frugal.tests.helpers.quantize import layer, output_error

pytest.importorskip("comfy_kitchen")

SOLVED = [target for target in table.TARGETS if target != table.BF16]


def held(target, weight, statistics=None):
    shape = tuple(weight.shape)
    made = codec.encode(target, weight, "cpu", statistics=statistics)
    return codec.decode(target, made, None, shape), made


@pytest.fixture(scope="module", params=[11, 12])
def bed(request):
    return layer(request.param, out=128, inside=512, seen=2048, held_out=1024)


@pytest.fixture(scope="module")
def small():
    return layer(13, out=32, inside=256, seen=1024, held_out=512)


@pytest.mark.parametrize("target", SOLVED)
def test_halves_the_output_error_of_rounding(target, bed):
    nearest, plain = held(target, bed.weight)
    solved, made = held(target, bed.weight, statistics_of("layer", bed.seen))
    errors = [output_error(bed.weight, each, bed.held_out) for each in (nearest, solved)]
    assert errors[1] < 0.5 * errors[0]
    # The same tensors of the same sizes, so the file is no larger.
    assert {suffix: (t.dtype, t.shape) for suffix, t in made.items()} == {
        suffix: (t.dtype, t.shape) for suffix, t in plain.items()
    }
    # It is the output that is kept: the weights themselves are further away.
    assert (solved - bed.weight).norm() > 1.05 * (nearest - bed.weight).norm()


@pytest.mark.parametrize("target", SOLVED)
def test_the_same_inputs_give_the_same_bytes(target, small):
    weight, seen, _ = small
    before = weight.clone()
    made = [held(target, weight, statistics_of("layer", seen))[1] for _ in range(2)]
    for suffix, tensor in made[0].items():
        other = made[1][suffix]
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (tensor, other)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("target", SOLVED)
def test_rows_are_solved_in_parts(target, small, monkeypatch):
    weight, seen, held_out = small
    whole, _ = held(target, weight, statistics_of("layer", seen))
    monkeypatch.setattr(gptq, "PART", 7 * 256)
    parts, _ = held(target, weight, statistics_of("layer", seen))
    # A product of another shape rounds differently, and a code may tip over.
    errors = [output_error(weight, each, held_out) for each in (whole, parts)]
    assert abs(errors[0] - errors[1]) < 0.03 * errors[0]
    assert (whole - parts).norm() < 0.5 * (whole - weight).norm()


@pytest.mark.numeric
def test_the_rotation_is_comfy_kitchens():
    from comfy_kitchen.tensor.int8_utils import _build_hadamard

    for size in (4, 16, 64, 256):
        ours = rotation.hadamard(size)
        theirs = _build_hadamard(size, device="cpu", dtype=torch.float32)
        assert torch.allclose(ours, theirs, atol=1e-7)
        assert torch.allclose(ours @ ours, torch.eye(size), atol=1e-6)
        weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(size))
        exact = rotation.rotate_by_matmul(weight.double(), size)
        limit = rounding.bound(torch.float32, size)
        assert rounding.distance(rotation.rotate(weight, size), exact) <= limit
        assert rounding.distance(rotation.rotate_by_matmul(weight, size), exact) <= limit
        # Element by element: the same for any rows, and undone within rounding.
        assert torch.equal(rotation.rotate(weight[1:4], size), rotation.rotate(weight, size)[1:4])
        back = rotation.rotate(rotation.rotate(weight, size), size)
        assert rounding.distance(back, weight) <= limit


def naive_gptq(weight, hessian, snap):
    """The paper's algorithm 1 for one row at a time, float64, no blocks: weight [out, in]."""
    inverse = torch.linalg.inv(hessian.double())
    upper = torch.linalg.cholesky(inverse, upper=True)
    out = weight.double().clone()
    for j in range(out.shape[1]):
        value = snap(out[:, j])
        error = (out[:, j] - value) / upper[j, j]
        out[:, j:] -= error[:, None] * upper[j, j:]
        out[:, j] = value
    return out


def spread_hessian(size, seed):
    make = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=make) @ torch.randn(size, size, generator=make)
    return rows.t() @ rows / len(rows)


def test_feeds_errors_forward_as_the_paper_does():
    weight = 20 * torch.randn(24, 300, generator=torch.Generator().manual_seed(1))
    ready = gptq.prepare(spread_hessian(300, 2), 0, 1, torch.device("cpu"))
    columns = weight[:, ready.order].t().contiguous()
    ours = gptq.feed_forward(columns.clone(), ready.upper, grids.PlainGrid(float8=False))
    meant = naive_gptq(columns.t(), ready.hessian, lambda x: x.round().clamp(-127, 127))
    assert (ours.t() == meant).double().mean() > 0.97
    inverse = ready.upper.t().double() @ ready.upper.double()
    eye = inverse @ ready.hessian.double()
    assert torch.allclose(eye, torch.eye(300, dtype=torch.double), atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([16, 48, 160]),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    float8=st.booleans(),
)
def test_descending_never_goes_up(size, rows, seed, float8):
    make = torch.Generator().manual_seed(seed)
    columns = 15 * torch.randn(size, rows, generator=make)
    ready = gptq.prepare(spread_hessian(size, seed), 0, 1, torch.device("cpu"))
    grid = grids.PlainGrid(float8)
    values = gptq.feed_forward(columns.clone(), ready.upper, grid)
    losses = [clip.loss(values, columns, ready.hessian)]
    for _ in range(3):
        gptq.descend(values, columns, ready.hessian, grid)
        losses.append(clip.loss(values, columns, ready.hessian))
    assert torch.equal(grid.snap((), values), values)
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4) + 1e-6 * losses[0].max()).all())


@pytest.mark.parametrize("target", [table.W4A8, table.W4A8_G64])
def test_codes_stand_for_the_native_levels(target, small):
    weight, seen, _ = small
    decoded, made = held(target, weight, statistics_of("layer", seen))
    codes = codec.unpack_nibbles(made["weight"]).long()
    group = 256 // made["weight_s_rel"].shape[1]
    scale = made["weight_s_rel"].float().repeat_interleave(group, dim=1)
    levels = (made["weight_codebook"][codes] * scale).round().clamp(-127, 127)
    rotated = levels * made["weight_s_channel"][:, None]
    assert torch.allclose(rotation.rotate(rotated, 256), decoded, atol=1e-6)
    # The scales moved by at most two of their own steps.
    plain = codec.encode(target, weight, "cpu")
    moved = made["weight_s_rel"].view(torch.int8) - plain["weight_s_rel"].view(torch.int8)
    assert int(moved.abs().max()) <= 2 and float((moved != 0).float().mean()) > 0.1
    for suffix in ("weight_s_channel", "weight_codebook"):
        assert torch.equal(made[suffix], plain[suffix])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_awq_scales_have_the_type_of_the_weight(kind, small):
    weight, seen, held_out = small
    solved, made = held(table.AWQ, weight.to(kind), statistics_of("layer", seen))
    assert made["weight_scale"].dtype == made["weight_zeros"].dtype == table.half(kind)
    nearest, _ = held(table.AWQ, weight.to(kind))
    errors = [output_error(weight, each, held_out) for each in (solved, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("target", SOLVED)
@pytest.mark.parametrize("kind", ["dead inputs", "few rows", "one input", "none"])
def test_poor_statistics_are_no_worse_than_rounding(target, kind, small):
    weight, seen, _ = small
    seen = seen.clone()
    if kind == "dead inputs":
        seen[:, 40:90] = 0
    elif kind == "few rows":
        seen = seen[:5]
    elif kind == "one input":
        seen[:, 1:] = 0
    else:
        seen = torch.zeros_like(seen)
    solved, _ = held(target, weight, statistics_of("layer", seen))
    nearest, _ = held(target, weight)
    assert bool(torch.isfinite(solved).all())
    # What was never seen is rounded, not dropped.
    assert (solved - weight).norm() < 4 * (nearest - weight).norm()
    if target == table.FP8 and kind == "dead inputs":
        dead = slice(40, 90)
        wrong = [(each - weight)[:, dead].norm() for each in (solved, nearest)]
        assert wrong[0] < 1.1 * wrong[1]
    if kind != "none":
        assert output_error(weight, solved, seen) <= output_error(weight, nearest, seen)


@pytest.mark.parametrize("target", SOLVED)
def test_weights_of_zero_stay_zero(target, small):
    weight = small.weight.clone()
    weight[3] = 0
    solved, _ = held(target, weight, statistics_of("layer", small.seen))
    assert float(solved[3].abs().max()) < 1e-6
    everything, _ = held(target, torch.zeros(16, 256), statistics_of("layer", small.seen))
    assert float(everything.abs().max()) < 1e-6


def test_damping_rises_until_it_can_be_factorised(small, caplog):
    hessian = torch.eye(256)
    hessian[0, 1] = hessian[1, 0] = 1.05
    statistics = from_hessian("blocks.7.ffn.0", hessian)
    clip.solve(table.FP8, small.weight, statistics, "cpu")
    assert "blocks.7.ffn.0: damping raised to 0.1" in caplog.text
    hessian[0, 1] = hessian[1, 0] = 50
    with pytest.raises(FrugalError, match=r"blocks\.7\.ffn\.0 cannot be factorised .* damping 10"):
        gptq.solve(table.W4A8, small.weight, from_hessian("blocks.7.ffn.0", hessian), "cpu")


@pytest.mark.parametrize("target", SOLVED)
def test_wrong_statistics_are_refused(target, small):
    with pytest.raises(FrugalError, match="has 128 inputs; expected 256"):
        held(target, small.weight, statistics_of("layer", small.seen[:, :128]))
    broken = small.seen.clone()
    broken[5, 5] = torch.nan
    with pytest.raises(FrugalError, match="not finite"):
        held(target, small.weight, statistics_of("layer", broken))


def test_layers_with_one_input_share_the_factorisation(small, monkeypatch):
    made = []
    original = gptq.prepare
    monkeypatch.setattr(gptq, "prepare", lambda *a: made.append(a) or original(*a))
    statistics = statistics_of("layer", small.seen)
    for target in (table.W4A8, table.W4A8, table.AWQ):
        gptq.solve(target, small.weight, statistics, "cpu")
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["correlated", "white"])
@pytest.mark.parametrize("rows", [16, 64])
def test_few_inputs_do_not_hide_the_error(kind, rows):
    """The error that is told must be that on inputs which the solver did not see."""
    bed = layer(7, out=32, inside=256, seen=64, held_out=1024)
    seen, others = bed.seen, bed.held_out
    if kind == "white":
        make = torch.Generator().manual_seed(7)
        seen, others = (torch.randn(count, 256, generator=make) for count in (64, 1024))
    statistics = statistics_of("layer", seen[:rows])
    found = layer_curve("layer", bed.weight, (table.W4A8_G64,), statistics=statistics)
    made = codec.encode(table.W4A8_G64, bed.weight, "cpu", statistics=statistics)
    held = codec.decode(table.W4A8_G64, made, None, tuple(bed.weight.shape))
    true = output_error(bed.weight, held, others)
    told = found.formats[table.W4A8_G64].relative
    assert 0.9 < true / told < 1.25
    # On what was solved for it looks far smaller.
    assert true / output_error(bed.weight, held, seen[:rows]) > 1.5
