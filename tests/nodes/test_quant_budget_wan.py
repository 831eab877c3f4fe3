"""Formats chosen under a budget, by the error at the end of a tiny Wan model inside ComfyUI."""

from __future__ import annotations

import math

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch

from frugal.demo import tiny_wan
from frugal.kernels.quant import formats
from frugal.kernels.quant.budget import frontier
from frugal.kernels.quant.calibration import read_calibration
from frugal.kernels.quant.curves import measure
from frugal.kernels.quant.importance import probe, wiring
from frugal.kernels.quant.job import shares_of
from frugal.kernels.quant.model_error import end_to_end
from frugal.nodes.quantize import capture

BLOCKS = 3
TARGETS = (formats.BF16, formats.FP8, formats.INT8, formats.W4A8, formats.W4A8_G64)
UNIFORM = (formats.FP8, formats.INT8, formats.W4A8)


class Bench:
    """A tiny model in fp32, its error curves, and its output with any layers replaced."""

    def __init__(self):
        shapes = tiny_wan.wan_shapes(tiny_wan.WanSize(dim=128, ffn=512, layers=BLOCKS))
        state = tiny_wan.fill(shapes, 6, torch.bfloat16)
        self.layers = [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        ]
        self.weights = {name: state[f"{name}.weight"] for name in self.layers}
        with torch.inference_mode(False):
            patcher = comfy.sd.load_diffusion_model_state_dict(
                {name: tensor.float() for name, tensor in state.items()},
                model_options={"dtype": torch.float32},
            )
        self.patcher, self.statistics = patcher, lambda name: None
        self.model = patcher.model.diffusion_model
        self.held = dict(self.model.named_parameters())
        self.readers = [(name, lambda name=name: self.weights[name]) for name in self.layers]
        self.curves = measure(self.readers, TARGETS)
        make = torch.Generator().manual_seed(7)
        self.inputs = [
            (torch.randn(1, 16, 2, 8, 8, generator=make), time, tiny_wan.text_embedding(seed=9))
            for time in (900.0, 300.0)
        ]
        self.decoded = {}

    @torch.no_grad()
    def output(self, replaced) -> torch.Tensor:
        for name, weight in replaced.items():
            self.held[f"{name}.weight"].copy_(weight)
        outs = [self.model(x, torch.tensor([time]), context=text) for x, time, text in self.inputs]
        for name in replaced:
            self.held[f"{name}.weight"].copy_(self.weights[name])
        return torch.cat(outs)

    def disturbed(self, differences) -> torch.Tensor:
        return self.output(
            {name: self.weights[name].float() + more for name, more in differences.items()}
        )

    def stored(self, name: str, target: str) -> torch.Tensor:
        if (name, target) not in self.decoded:
            weight = self.weights[name]
            tensors = formats.encode(target, weight, "cpu", statistics=self.statistics(name))
            options = formats.options(target, tuple(weight.shape))
            self.decoded[name, target] = formats.decode(
                target, tensors, options, tuple(weight.shape)
            )
        return self.decoded[name, target]

    def error(self, choice) -> float:
        replaced = {name: self.stored(name, target) for name, target in choice.items()}
        return end_to_end(self.output({}), self.output(replaced)).relative

    def bytes(self, choice) -> int:
        return sum(self.curves[name].formats[target].bytes for name, target in choice.items())

    def edges(self, few: str, many: str, blocks: int) -> dict[str, str]:
        """The usual list of names: all but the inner blocks, and those, in one format each."""
        inner = tuple(f"blocks.{place}." for place in range(blocks, BLOCKS - blocks))
        return {name: many if name.startswith(inner) else few for name in self.layers}


@pytest.fixture(scope="module")
def bench(comfy_tree):
    pytest.importorskip("comfy_kitchen")
    return Bench()


def mixes(bench) -> dict[str, dict[str, str]]:
    found = {target: dict.fromkeys(bench.layers, target) for target in UNIFORM}
    found["ends in int8"] = bench.edges(formats.INT8, formats.W4A8, 1)
    found["ends in bf16"] = bench.edges(formats.BF16, formats.INT8, 1)
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
    model = capture.wrap(bench.patcher, capture.Settings(path, False, 10**9, 10**6, 0, shares=True))
    start, text = torch.zeros(1, 16, 2, 8, 8), tiny_wan.text_embedding(seed=4)
    steps = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(start, 3), 1.0,
            comfy.samplers.sampler_object("euler"), steps, [[text, {}]], [[text, {}]], start,
            seed=3, disable_pbar=True,
        )  # fmt: skip
    known = read_calibration(path)

    def statistics(name):
        # Solving 4096 inputs would take most of the time of this test.
        return None if name == "text_embedding.0" else known.layer(name)

    curves = measure(bench.readers, TARGETS, statistics=statistics)
    shares, note = shares_of(bench.layers, known, curves)
    assert note == "shares of the layers measured in 1 runs"
    monkeypatch.setattr(bench, "statistics", statistics)
    monkeypatch.setattr(bench, "decoded", {})
    swept = frontier(curves, 0, importance=shares)
    for name, mix in mixes(bench).items():
        found = swept.at(bench.bytes(mix))
        assert found.bytes <= bench.bytes(mix)
        error, other = bench.error(found.choice), bench.error(mix)
        assert error <= other, (name, error, other)
