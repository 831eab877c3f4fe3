"""Formats chosen under a budget, by the error at the end of a tiny Wan model inside ComfyUI."""

from __future__ import annotations

import math

import pytest

from frugal.kernels.formats import table
from frugal.kernels.quantize.budget import frontier
from frugal.kernels.quantize.calibration import read_calibration
from frugal.kernels.quantize.curves import measure
from frugal.kernels.quantize.request import shares_of
from frugal.kernels.quantize.sensitivity import probe, wiring
from frugal.tests.helpers.budget import TARGETS, Bench

UNIFORM = (table.FP8, table.INT8, table.W4A8)


@pytest.fixture(scope="module")
def bench(comfy_tree):
    pytest.importorskip("comfy_kitchen")
    return Bench()


def mixes(bench) -> dict[str, dict[str, str]]:
    found = {target: dict.fromkeys(bench.layers, target) for target in UNIFORM}
    found["ends in int8"] = bench.edges(table.INT8, table.W4A8, 1)
    found["ends in bf16"] = bench.edges(table.BF16, table.INT8, 1)
    return found


def test_measured_shares_halve_the_error_and_predict_it(bench):
    """Against uniform formats and lists of names, in no more bytes."""
    shares = probe(bench.readers, bench.disturbed)
    swept = frontier(bench.curves, 0, importance=shares)
    for name, mix in mixes(bench).items():
        found = swept.at(bench.bytes(mix))
        assert found.bytes <= bench.bytes(mix)
        error, other = bench.error(found.choice), bench.error(mix)
        assert error < 0.5 * other, (name, error, other)
        assert error == pytest.approx(math.sqrt(found.error), rel=0.15), name


def test_wiring_alone_beats_uniform_formats_and_ends_in_int8(bench):
    """It does not know how strong a branch is: against ends in bf16 it loses by a third."""
    swept = frontier(bench.curves, 0, importance=wiring(bench.layers))
    for name, mix in mixes(bench).items():
        found = swept.at(bench.bytes(mix))
        error, other = bench.error(found.choice), bench.error(mix)
        assert error <= other * (1.5 if name == "ends in bf16" else 1 + 1e-6), (name, error, other)


def test_shares_measured_while_sampling_beat_every_mix(bench, tmp_path, monkeypatch):
    """The way of the node: one run of the sampler, its file, then formats by that file."""
    path = tmp_path / "wan.safetensors"
    bench.run(path, [4], 3, 4, shares=True)
    known = read_calibration(path)

    def statistics(name):
        # Solving 4096 inputs would take most of the time of this test.
        return None if name == "text_embedding.0" else known.layer(name)

    curves = measure(bench.readers, TARGETS, statistics=statistics)
    shares, note = shares_of(bench.layers, known, curves)
    assert note == "layer sensitivity measured in 1 runs"
    monkeypatch.setattr(bench, "statistics", statistics)
    monkeypatch.setattr(bench, "decoded", {})
    swept = frontier(curves, 0, importance=shares)
    for name, mix in mixes(bench).items():
        found = swept.at(bench.bytes(mix))
        assert found.bytes <= bench.bytes(mix)
        error, other = bench.error(found.choice), bench.error(mix)
        assert error <= other, (name, error, other)
        # On the other text and noise of the bench; the statistics come from one text of 12 tokens.
        predicted = math.sqrt(found.error)
        assert 0.5 * predicted < error < 2 * predicted, (name, error, predicted)
