"""Error curves and the quality report: against outputs computed in full, as data, text, picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from frugal.kernels.chart import WIDTH
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, table
from frugal.kernels.quantize import curves as module
from frugal.kernels.quantize import quality
from frugal.kernels.quantize.budget import allocate, frontier
from frugal.kernels.quantize.check_picture import COLOUR, check_picture
from frugal.kernels.quantize.curves import FormatError, layer_curve, measure, stored_error
from frugal.kernels.quantize.model_error import end_to_end, model_error
from frugal.kernels.quantize.quality import QualityReport, chosen, report_of
from frugal.kernels.quantize.quality_picture import COLOURS, HEIGHT, picture
from frugal.kernels.quantize.reference_calls import ReferenceCall

SHAPE = (48, 128)


class Recorded:
    """The second moments of given inputs, which stand for all that there are."""

    independent = 0

    def __init__(self, inputs: torch.Tensor):
        self.inputs = inputs

    def hessian(self) -> torch.Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)


def layer(seed: int, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 weight and correlated inputs with outlier channels."""
    make = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=make) / shape[1] ** 0.5).bfloat16()
    mixed = torch.randn(shape[1], shape[1], generator=make)
    inputs = torch.randn(300, shape[1], generator=make) @ mixed / shape[1] ** 0.5
    inputs[:, :4] *= 12
    return weight, inputs


@pytest.fixture
def rounded(monkeypatch):
    """Encoding to the nearest value whatever the statistics: these tests are about the figures."""
    encode = codec.encode

    def nearest(target, weight, device, options=None, statistics=None, **rest):
        return encode(target, weight, device, options, None, **rest)

    monkeypatch.setattr(codec, "encode", nearest)


@pytest.mark.parametrize("target", table.TARGETS)
@pytest.mark.parametrize("calibrated", (False, True))
def test_figures_are_those_of_the_outputs(target, calibrated, rounded, monkeypatch):
    pytest.importorskip("comfy_kitchen")
    monkeypatch.setattr(module, "PIECE", 5 * SHAPE[1])
    weight, inputs = layer(3)
    known = Recorded(inputs) if calibrated else None
    made = layer_curve("a", weight, (target,), statistics=known)
    error = made.formats[target]
    tensors = codec.encode(target, weight, "cpu")
    stored = codec.decode(target, tensors, table.options(target, SHAPE), SHAPE).double()
    seen = inputs.double() if calibrated else torch.eye(SHAPE[1]).double()
    out, kept = seen @ weight.double().T, seen @ stored.T
    expected = end_to_end(out, kept)
    assert error.relative == pytest.approx(expected.relative, rel=1e-4)
    assert 1 - error.cosine == pytest.approx(1 - expected.cosine, rel=1e-3, abs=1e-9)
    if target == table.BF16:
        assert error.noise == 0 and error.snr_db == math.inf and error.cosine == 1
    else:
        assert 0 < error.relative < 0.2
        assert error.snr_db == pytest.approx(expected.snr_db, rel=1e-4)
    assert error.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert error.bytes == table.stored_bytes(target, SHAPE)
    assert made.calibrated is calibrated


def test_figures_of_known_energies():
    error = FormatError(10, 0.04, 4.0, 4.0)
    assert error.relative == pytest.approx(0.1) and error.snr_db == pytest.approx(20.0)
    assert error.cosine == pytest.approx(4 / math.sqrt(4 * 4.04))
    assert FormatError(10, 4.0, 4.0, 0.0).cosine == 0
    assert FormatError(10, 0.0, 0.0, 0.0).cosine == 1


def test_zero_weights_lose_nothing():
    pytest.importorskip("comfy_kitchen")
    made = layer_curve("a", torch.zeros(SHAPE, dtype=torch.bfloat16))
    assert all(error.noise == 0 and error.relative == 0 for error in made.formats.values())


def test_widths_that_do_not_suit_are_named():
    made = layer_curve("a", torch.ones(8, 20).bfloat16(), (table.BF16, table.INT8))
    assert set(made.formats) == {table.BF16} and "20 inputs" in made.refused[table.INT8]


def test_refusals():
    weight, _ = layer(1)
    with pytest.raises(FrugalError, match="a has 128 inputs, its calibration"):
        layer_curve("a", weight, (table.BF16,), statistics=Recorded(torch.ones(3, 64)))
    bad = Recorded(torch.full((3, 128), math.nan))
    with pytest.raises(FrugalError, match="finite weights and statistics"):
        layer_curve("a", weight, (table.BF16,), statistics=bad)
    with pytest.raises(FrugalError, match="x holds a weight that is not finite"):
        layer_curve("blocks.0.x", torch.full(SHAPE, math.nan).bfloat16(), (table.FP8,))
    stored = {"weight": torch.ones(2, 16).bfloat16()}
    with pytest.raises(FrugalError, match="an output of energy 0"):
        stored_error("a", table.BF16, torch.zeros(2, 16), stored, {})


def test_one_weight_at_a_time_and_calibrated_where_known():
    pytest.importorskip("comfy_kitchen")
    steps, alive = [], []

    def read(name):
        def weight():
            assert len(steps) == len(alive)
            alive.append(name)
            return layer(len(alive))[0]

        return weight

    known = {"b": Recorded(layer(2)[1])}
    names = ("a", "b", "c")
    made = measure(
        ((name, read(name)) for name in names),
        (table.BF16,),
        statistics=known.get,
        step=lambda curve: steps.append(curve.name),
    )
    assert tuple(made) == tuple(steps) == names
    assert [one.calibrated for one in made.values()] == [False, True, False]


@pytest.fixture(scope="module")
def curves():
    pytest.importorskip("comfy_kitchen")
    names = [f"blocks.{place}.{part}" for place in range(3) for part in ("ffn.0", "self_attn.q")]
    weights = {name: layer(place)[0] for place, name in enumerate([*names, "head.head"])}
    return measure((name, lambda name=name: weights[name]) for name in weights)


def report(curves, **more) -> QualityReport:
    middle = (frontier(curves, 77).smallest + frontier(curves, 77).largest) // 2
    found = allocate(curves, 77, middle)
    rows = tuple(chosen(curves, found.choice))
    return QualityReport("made.safetensors", "wan.safetensors", found.bytes, rows, **more)


def lost(*outputs):
    """The error of calls whose output should have been four ones."""
    calls = [ReferenceCall({}, torch.ones(4), 0.5, {}) for _ in outputs]
    return model_error("c.safetensors", calls, [torch.tensor(each) for each in outputs], ["two"])


def test_report_adds_up(curves):
    made = report(curves, end_to_end=lost([1, 1, 1, 1.2]))
    assert list(made.blocks) == ["blocks.0", "blocks.1", "blocks.2", "outside"]
    assert sum(part.bytes for part in made.blocks.values()) == made.whole.bytes == made.bytes - 77
    assert sum(part.bytes for part in made.targets.values()) == made.whole.bytes
    squares = [one.relative**2 for one in made.layers]
    assert made.whole.relative == pytest.approx(math.sqrt(sum(squares) / len(squares)))
    block = [one.relative for one in made.layers if one.name.startswith("blocks.1.")]
    assert made.blocks["blocks.1"].worst == max(block)
    assert made.basis == quality.ALONE
    assert made.end_to_end.whole.relative == pytest.approx(0.1)
    assert made.end_to_end.whole.snr_db == pytest.approx(20)
    text = made.text()
    for part in (
        f"({made.bytes} bytes)",
        "blocks.*.ffn.0",
        quality.ALONE,
        "rel-L2 0.1000",
        "20.0 dB",
    ):
        assert part in text


def test_json_beside_the_model_comes_back(curves, tmp_path):
    made = report(curves, notes=("one",), end_to_end=lost([1, 1, 1, 1.0], [1, 1, 0, 1.0]))
    path = quality.write_json(made, quality.json_path(tmp_path / "wan.v2.safetensors"))
    assert path == tmp_path / "wan.v2.quality.json" and list(tmp_path.iterdir()) == [path]
    held = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert held["whole"]["bytes"] == made.whole.bytes and held["basis"] == made.basis
    assert any(row["snr_db"] is None for row in held["layers"])
    assert quality.read_json(path) == made
    for text in ("", "[]", "{}", json.dumps(held | {"layers": [{"name": 1}]})):
        path.write_text(text)
        with pytest.raises(FrugalError, match=r"wan.v2.quality.json is no readable"):
            quality.read_json(path)


def test_failed_write_leaves_the_old_report(curves, tmp_path, monkeypatch):
    path = quality.write_json(report(curves), quality.json_path(tmp_path / "wan.safetensors"))
    before = path.read_bytes()
    monkeypatch.setattr(quality.json, "dumps", lambda *_, **__: "x" * 10 + "\u00e9")
    with pytest.raises(UnicodeEncodeError):
        quality.write_json(report(curves), quality.json_path(tmp_path / "wan.safetensors"))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_figures_while_converting_make_the_same_report(curves):
    weight, inputs = layer(1)
    name = "blocks.0.ffn.0"
    rows = []
    for target in (table.INT8, table.W4A8):
        tensors = codec.encode(target, weight, "cpu")
        row = quality.measured(name, target, weight, tensors, Recorded(inputs))
        rows.append(json.loads(json.dumps(row, allow_nan=False)))
    made = report_of("f", "s", 1000, rows)
    known = Recorded(inputs)
    for one in made.layers:
        tensors = codec.encode(one.target, weight, "cpu")
        options = table.options(one.target, SHAPE)
        error = stored_error(name, one.target, weight, tensors, options, known)
        assert (one.relative, one.bytes) == (error.relative, error.bytes)
    assert made.basis == "errors of the outputs of 2 layers on calibration inputs"


def test_plan_says_size_and_error(curves):
    middle = (frontier(curves, 77).smallest + frontier(curves, 77).largest) // 2
    found = allocate(curves, 77, middle)
    text = quality.plan_text(found, curves, middle)
    assert f"({found.bytes} bytes)" in text and quality.ALONE in text
    assert f"output: {math.sqrt(found.error):.4f}" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("blocks", "head"))]
    assert rows and sum(int(row[-4]) for row in rows) == len(curves)
    groups = [row[0] for row in rows]
    assert groups == sorted(groups, key=groups.index), "lines of one group stand together"


def test_end_to_end_refuses_what_it_cannot_compare():
    with pytest.raises(FrugalError, match="two outputs of one shape"):
        end_to_end(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(FrugalError, match="one of them does not work"):
        end_to_end(torch.ones(3), torch.tensor([1, math.inf, 1]))
    with pytest.raises(FrugalError, match="not zero"):
        end_to_end(np.zeros(3), np.ones(3))


def test_all_calls_are_taken_together():
    made = lost([1, 1, 1, 1.0], [1, 1, 0, 1.0], [0, 1, 0, 1.0])
    assert [call.error.numbers for call in made.calls] == [4, 4, 4]
    assert made.calls[0].error.snr_db is None
    assert made.calls[1].error.relative == pytest.approx(0.5)
    assert made.whole.numbers == 12
    assert made.whole.relative == pytest.approx(0.5)
    assert made.whole.cosine == pytest.approx(9 / math.sqrt(12 * 9))
    assert made.notes == ("two",)
    assert "is this the model" in lost([1, 0, 1, 0.0]).notes[1]


def test_picture_of_a_check(curves):
    pytest.importorskip("PIL")
    made = lost([1, 1, 1, 1.1], [1, 1, 1, 1.2])
    alone = check_picture(made, None)
    bars = (alone[90:240] == COLOUR).all(axis=2).sum(axis=0)
    halves = [int(part.max()) for part in np.split(bars, [554])]
    assert halves[1] == pytest.approx(2 * halves[0], abs=2)
    both = check_picture(made, report(curves, end_to_end=made))
    assert both.shape == (HEIGHT + len(alone), WIDTH, 3)
    assert np.array_equal(both[HEIGHT:], alone)


def test_picture_shows_every_format_and_rises_with_the_error(curves):
    pytest.importorskip("PIL")
    made = report(curves)
    image = picture(made)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    for target, colour in COLOURS.items():
        shown = (image == colour).all(axis=2).sum()
        # The legend alone has about 170 px of a colour.
        assert shown > 400 if target in made.targets else shown == 0, target
    rows = [
        quality.LayerQuality(f"blocks.{place}.a", table.FP8, 10, error, 1.0, None, True)
        for place, error in enumerate((0.01, 0.02, 0.04))
    ]
    image = picture(QualityReport("f", "s", 30, tuple(rows)))
    upper = (image[120:390] == COLOURS[table.FP8]).all(axis=2)
    heights = upper.sum(axis=0)
    bars = [int(part.max()) for part in np.split(heights, [390, 698])]
    assert bars[1] == pytest.approx(2 * bars[0], abs=2) and bars[2] == pytest.approx(
        2 * bars[1], abs=2
    )


def test_picture_of_any_report(curves):
    pytest.importorskip("PIL")
    exact = report(curves).layers[:1]
    empty = QualityReport("f" * 300, "s", 0, ())
    assert picture(empty).shape == picture(QualityReport("f", "s", 1, exact)).shape
    many = [
        quality.LayerQuality(f"blocks.{place}.a", "another format", 1, 0.5, 1.0, 6.0, False)
        for place in range(200)
    ]
    many.append(quality.LayerQuality("vace_blocks.0.b", table.AWQ, 1, 0.5, 1.0, 6.0, False))
    assert picture(QualityReport("f", "s", 200, tuple(many))).shape == (HEIGHT, WIDTH, 3)


def test_undirected_noise_reaches_the_output_as_predicted():
    """`white` against noise drawn many times; 1 by definition without recorded inputs."""
    weight, inputs = layer(4)
    made = layer_curve("a", weight, (table.BF16,), statistics=Recorded(inputs))
    make = torch.Generator().manual_seed(1)
    out = inputs @ weight.float().T
    ratios = []
    for _ in range(40):
        noise = torch.randn(SHAPE, generator=make)
        lost = (inputs @ noise.T).square().sum() / out.square().sum()
        ratios.append(float(lost / (noise.square().sum() / weight.float().square().sum())))
    assert made.white == pytest.approx(sum(ratios) / len(ratios), rel=0.05)
    assert abs(made.white - 1) > 0.01
    assert layer_curve("a", weight, (table.BF16,)).white == 1
