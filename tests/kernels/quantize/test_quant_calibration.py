"""Statistics of inputs: sums, sketches, merging, and the calibration file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frugal.kernels.atomic_write import WriteError
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, table
from frugal.kernels.quantize import calibration, gptq
from frugal.kernels.quantize.calibration import read_calibration, write_calibration
from frugal.kernels.quantize.moments import Gatherer, Moment, columns_within, merged
from frugal.kernels.quantize.reference_calls import ReferenceCall, unstorable
from frugal.tests.helpers.quantize import layer, output_error
from tests.helpers.full_disk import room_for


def rows_of(count, width, seed=0):
    """Inputs whose directions fall off, with one channel far larger."""
    make = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=make))
    rows = torch.randn(count, width, generator=make) * torch.logspace(0, -2, width) @ basis.t()
    rows[:, 0] *= 20
    return rows


def gathered(rows, columns, pieces=1, dtype=torch.float32):
    gatherer = Gatherer(rows.shape[1], columns)
    for piece in rows.chunk(pieces):
        gatherer.add(piece.to(dtype))
    return gatherer.moment("layer")


def relative(one, other):
    return float((one - other).norm() / other.norm())


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 70),
    count=st.integers(1, 90),
    pieces=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_whole_statistics_are_the_mean_of_products(width, count, pieces, seed):
    rows = rows_of(count, width, seed)
    moment = gathered(rows, width, pieces)
    meant = rows.double().t() @ rows.double() / count
    dense = moment.dense()
    assert moment.rows == count and torch.equal(dense, dense.t())
    scale = meant.diagonal().sqrt()
    assert float(((dense - meant) / scale / scale[:, None]).abs().max()) < 1e-3
    assert relative(dense.diagonal(), meant.diagonal()) < 1e-6


def test_a_panel_smaller_than_the_width(monkeypatch):
    rows = rows_of(64, 50)
    whole = gathered(rows, 50)
    sketch = gathered(rows, 20).dense()
    monkeypatch.setattr("frugal.kernels.quantize.moments.PANEL", 16)
    assert relative(gathered(rows, 50).correlation.float(), whole.correlation.float()) < 1e-3
    assert relative(gathered(rows, 50).dense(), whole.dense()) < 1e-3
    panels = gathered(rows, 20).dense()
    assert relative(panels, sketch) < 1e-2 and torch.equal(panels, panels.t())


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_a_sketch_keeps_the_largest_directions(columns):
    rows = rows_of(1000, 256)
    meant = rows.t() @ rows / 1000
    moment = gathered(rows, columns, pieces=3)
    assert moment.factor.shape == (256, columns // 2) and moment.correlation is None
    dense = moment.dense()
    assert relative(dense.diagonal(), meant.diagonal()) < 1e-5
    # The best approximation with as many directions, and the exact diagonal.
    values, vectors = torch.linalg.eigh(meant.double())
    best = (vectors[:, -columns // 2 :] * values[-columns // 2 :]) @ vectors[:, -columns // 2 :].t()
    best.diagonal().copy_(meant.diagonal())
    assert relative(dense, meant) < 1.3 * relative(best, meant) + 1e-3
    assert relative(torch.diag(meant.diagonal()), meant) > 2 * relative(dense, meant)
    assert float(torch.linalg.eigvalsh(dense.double()).min()) > -1e-4 * float(
        dense.diagonal().max()
    )


def test_more_columns_lose_less_in_the_end():
    """What a sketch costs where it matters: the output error of the solved layer."""
    pytest.importorskip("comfy_kitchen")
    weight, seen, held_out = layer(21, out=64, inside=256, seen=1024, held_out=512)
    errors = []
    for columns in (256, 128, 32):
        gatherer = Gatherer(256, columns)
        gatherer.add(seen)
        moment = gatherer.moment("layer")
        found = calibration.from_hessian("layer", moment.dense(), moment.rows)
        made = gptq.solve(table.W4A8, weight, found, "cpu")
        decoded = codec.decode(table.W4A8, made, None, (64, 256))
        errors.append(output_error(weight, decoded, held_out))
    made = codec.encode(table.W4A8, weight, "cpu")
    nearest = output_error(weight, codec.decode(table.W4A8, made, None, (64, 256)), held_out)
    assert errors[0] < errors[1] < errors[2] < 0.75 * nearest
    assert errors[0] < 0.5 * nearest


def test_rows_of_any_float_type_are_counted_as_they_are():
    rows = rows_of(40, 24).half()
    for dtype in (torch.float16, torch.float32, torch.float64):
        moment = gathered(rows.to(dtype), 24, dtype=dtype)
        assert torch.equal(moment.diagonal, gathered(rows.float(), 24).diagonal)


@pytest.mark.parametrize("columns", [48, 24])
def test_merging_two_runs_is_one_longer_run(columns):
    one, other = rows_of(200, 48, 1), 3 * rows_of(100, 48, 1)
    both = merged(gathered(one, columns), gathered(other, columns))
    together = gathered(torch.cat([one, other]), columns)
    assert both.rows == 300
    assert relative(both.diagonal, together.diagonal) < 1e-5
    assert relative(both.dense(), together.dense()) < (2e-3 if columns == 48 else 0.05)
    mixed = merged(gathered(one, 48), gathered(other, 24))
    assert mixed.factor is None and relative(mixed.dense(), together.dense()) < 0.05
    with pytest.raises(FrugalError, match="48 and 24 inputs"):
        merged(gathered(one, 48), gathered(rows_of(9, 24), 24))


@pytest.mark.parametrize("kind", ["one input rules", "few rows", "one row", "many small adds"])
def test_a_sketch_of_extreme_inputs(kind):
    rows = rows_of(400, 128)
    if kind == "one input rules":
        rows[:, 7] *= 1e5
    elif kind in ("few rows", "one row"):
        rows = rows[: 9 if kind == "few rows" else 1]
    dense = gathered(rows, 48, pieces=200 if kind == "many small adds" else 1).dense()
    meant = rows.double().t() @ rows.double() / len(rows)
    assert relative(dense, meant) < 0.05
    assert float(torch.linalg.eigvalsh(dense.double()).min()) > -1e-3 * float(
        dense.diagonal().max()
    )


@pytest.mark.parametrize("columns", [16, 32])
def test_inputs_that_were_always_zero(columns):
    rows = rows_of(100, 32)
    rows[:, [3, 31]] = 0
    dense = gathered(rows, columns).dense()
    assert bool(torch.isfinite(dense).all()) and not dense[3].any() and not dense[:, 31].any()
    nothing = gathered(torch.zeros(9, 32), columns).dense()
    assert not nothing.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_cannot_be_used_is_refused(value):
    gatherer = Gatherer(32, 32)
    with pytest.raises(FrugalError, match=r"the inputs of blocks\.0\.ffn\.0 are none"):
        gatherer.moment("blocks.0.ffn.0")
    rows = rows_of(9, 32)
    rows[2, 5] = value
    gatherer.add(rows)
    with pytest.raises(FrugalError, match="not finite"):
        gatherer.moment("layer")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 10**6))
def test_memory_is_used_and_not_exceeded(widths, memory):
    def taken(columns):
        return sum(4 * width * min(width, columns) for width in widths)

    enough = min(16, max(widths))
    if taken(enough) > memory:
        with pytest.raises(FrugalError, match="allow more memory"):
            columns_within(widths, memory)
        return
    columns = columns_within(widths, memory)
    assert taken(columns) <= memory
    assert columns == max(widths) or taken(columns + 1) > memory
    for width in widths:
        Gatherer(width, columns)


def test_files_come_back_as_they_were(tmp_path):
    moments = {0: gathered(rows_of(90, 40), 40), 1: gathered(rows_of(80, 64), 32)}
    inputs = {"blocks.0.self_attn.q": 0, "blocks.0.self_attn.k": 0, "blocks.0.ffn.2": 1}
    path = tmp_path / "wan.safetensors"
    write_calibration(path, inputs, moments, {"calls": 4, "models": ["a"]})
    assert [file.name for file in tmp_path.iterdir()] == ["wan.safetensors"]
    found = read_calibration(path)
    assert found.path == path and found.meta["calls"] == 4 and dict(found.inputs) == inputs
    assert found.layer("blocks.1.ffn.0") is None
    for name, index in inputs.items():
        statistics = found.layer(name)
        assert (statistics.name, statistics.rows) == (name, moments[index].rows)
        assert statistics.width == moments[index].width
        assert torch.equal(statistics.hessian(), moments[index].dense())
    q, k, out = (found.layer(name) for name in inputs)
    assert q.key == k.key != out.key and q.memo is k.memo
    before = path.read_bytes()
    write_calibration(path, inputs, moments, {"calls": 4, "models": ["a"]})
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path, moments = tmp_path / "wan.safetensors", {0: gathered(rows_of(90, 40), 40)}
    write_calibration(path, {"a": 0}, moments, {})
    before = path.read_bytes()
    with room_for(1000), pytest.raises(WriteError):
        write_calibration(path, {"a": 0}, moments, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_other_files_are_refused(tmp_path):
    path, moments = tmp_path / "wan.safetensors", {0: gathered(rows_of(90, 40), 40)}
    write_calibration(path, {"a": 0}, moments, {})
    tensors = load_file(path)
    content = {"version": 1, "layers": {"a": 0}, "rows": [90], "meta": {}}

    def written(changes, tensors=tensors):
        save_file(tensors, path, {calibration.MARK: json.dumps(content | changes)})

    written({})
    read_calibration(path)
    save_file(tensors, path, {})
    with pytest.raises(FrugalError, match="holds no frugal_calibration"):
        read_calibration(path)
    for changes, why in (
        ({"version": 2}, "version 2"),
        ({"layers": {"a": 1}}, "lists inputs it does not hold"),
        ({"layers": {}}, "lists inputs it does not hold"),
        ({"rows": ["many"]}, "damaged"),
        ({"rows": [90, 3]}, "for input 1"),
        ({"meta": 3}, "damaged"),
    ):
        written(changes)
        with pytest.raises(FrugalError, match=why):
            read_calibration(path)
    short = tensors | {"0.correlation": tensors["0.correlation"][:-1].clone()}
    written({}, short)
    with pytest.raises(FrugalError, match="for input 0"):
        read_calibration(path)
    with pytest.raises(FrugalError, match="1 inputs of 0 layers"):
        write_calibration(path, {}, moments, {})


def kept_calls():
    make = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, generator=make).half()
    arguments = {
        "x": x,
        "same": x[:1],
        "timestep": torch.tensor([999], dtype=torch.int64),
        "strength": [1.0, 0.5],
        "pieces": (torch.ones(2, dtype=torch.bfloat16), torch.zeros(1)),
        "flag": True,
        "none": None,
        "name": "vace",
    }
    first = ReferenceCall(arguments, torch.randn(4, generator=make), 0.25, {"class": "WAN21"})
    return [first, ReferenceCall({"x": x.t()}, torch.ones(1, dtype=torch.float16))]


def test_calls_come_back_as_they_were(tmp_path):
    path = tmp_path / "c.safetensors"
    moment = Moment(3, torch.ones(8), correlation=torch.zeros(36, dtype=torch.float16))
    calls = kept_calls()
    assert unstorable(calls[0].arguments) is None
    write_calibration(path, {"a": 0}, {0: moment}, {}, calls=calls)
    found = read_calibration(path)
    assert found.rows == (3,) and len(found.entries) == 2
    for wrote, read in zip(calls, found.calls(), strict=True):
        assert (read.sigma, read.model) == (wrote.sigma, wrote.model)
        assert torch.equal(read.output, wrote.output) and read.output.dtype == wrote.output.dtype
        assert list(read.arguments) == list(wrote.arguments)
        for name, value in wrote.arguments.items():
            got = read.arguments[name]
            pairs = zip(got, value, strict=True) if isinstance(value, tuple) else [(got, value)]
            for a, b in pairs:
                if isinstance(b, torch.Tensor):
                    assert torch.equal(a, b) and a.dtype == b.dtype, name
                else:
                    assert a == b and type(a) is type(b), name
    write_calibration(path, {"a": 0}, {0: moment}, {})
    assert read_calibration(path).calls() == []


@pytest.mark.parametrize("value", [{"a": 1}, object(), [{}], float("nan"), print])
def test_what_is_no_plain_value_cannot_be_kept(value):
    arguments = {"x": torch.ones(1), "odd": value}
    kind = type(value[0] if isinstance(value, list) else value).__name__
    assert unstorable(arguments) == f"odd ({kind})"


@pytest.mark.parametrize("damage", ["tensor gone", "output gone", "sigma", "no arguments", "text"])
def test_damaged_calls_are_told(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    moment = Moment(3, torch.ones(8), correlation=torch.zeros(36, dtype=torch.float16))
    write_calibration(path, {"a": 0}, {0: moment}, {}, calls=kept_calls())
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["frugal_calibration"])
    call = content["calls"][0]
    if damage == "tensor gone":
        del tensors["call.0.in.pieces.1"]
    elif damage == "output gone":
        del tensors["call.1.output"]
    elif damage == "sigma":
        call["sigma"] = "high"
    elif damage == "no arguments":
        del call["arguments"]
    else:
        call["arguments"]["x"] = "tensor"
    save_file(tensors, path, metadata={"frugal_calibration": json.dumps(content)})
    with pytest.raises(FrugalError, match=r"calibrate again.*damaged entries"):
        read_calibration(path)
