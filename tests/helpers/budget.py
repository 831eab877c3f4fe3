"""A tiny Wan model inside ComfyUI, its layers in every format, and its output with any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import torch

from frugal.demo import tiny_wan
from frugal.kernels.formats import codec, table
from frugal.kernels.quantize.curves import measure
from frugal.kernels.quantize.model_error import end_to_end
from frugal.kernels.quantize.reference_calls import ReferenceCall
from frugal.nodes.quantize import calibrate_run

BLOCKS = 3
TARGETS = (table.BF16, table.FP8, table.INT8, table.W4A8, table.W4A8_G64)


class Bench:
    """A tiny model in fp32, its error curves, and its output with any layers replaced."""

    def __init__(self, seed: int = 6):
        shapes = tiny_wan.wan_shapes(tiny_wan.WanSize(dim=128, ffn=512, layers=BLOCKS))
        state = tiny_wan.fill(shapes, seed, torch.bfloat16)
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
        text = tiny_wan.text_embedding(seed=9)
        self.calls: Sequence[Mapping[str, torch.Tensor]] = [
            {
                "x": torch.randn(1, 16, 2, 8, 8, generator=make),
                "timestep": torch.tensor([time]),
                "context": text,
            }
            for time in (900.0, 300.0)
        ]
        self.decoded = {}

    def run(self, path: Path, texts: Sequence[int], seed: int, steps: int, shares: bool) -> None:
        """Record one run of an ordinary sampler for each text (a seed), added to the file."""
        settings = calibrate_run.Settings(path, True, 10**9, 10**6, 0, shares=shares)
        model = calibrate_run.wrap(self.patcher, settings)
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        start = torch.zeros(1, 16, 2, 8, 8)
        for text in texts:
            embeds = [[tiny_wan.text_embedding(seed=text), {}]]
            with torch.inference_mode():
                comfy.sample.sample_custom(
                    model, comfy.sample.prepare_noise(start, seed + text), 1.0,
                    comfy.samplers.sampler_object("euler"), sigmas, embeds, embeds, start,
                    seed=seed, disable_pbar=True,
                )  # fmt: skip

    def use(self, calls: Sequence[ReferenceCall]) -> None:
        """Look at these calls from now on."""
        self.calls = [call.arguments for call in calls]

    @torch.no_grad()
    def output(self, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for name, weight in replaced.items():
            self.held[f"{name}.weight"].copy_(weight)
        outs = [self.model(**call) for call in self.calls]
        for name in replaced:
            self.held[f"{name}.weight"].copy_(self.weights[name])
        return torch.cat(outs)

    def disturbed(self, differences: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.output(
            {name: self.weights[name].float() + more for name, more in differences.items()}
        )

    def tensors(self, name: str, target: str) -> dict[str, torch.Tensor]:
        """A layer as it is stored, by suffix."""
        statistics = self.statistics(name)
        return codec.encode(target, self.weights[name], "cpu", statistics=statistics)

    def stored(self, name: str, target: str) -> torch.Tensor:
        """The weight that a stored layer stands for."""
        if (name, target) not in self.decoded:
            shape = tuple(self.weights[name].shape)
            options = table.options(target, shape)
            self.decoded[name, target] = codec.decode(
                target, self.tensors(name, target), options, shape
            )
        return self.decoded[name, target]

    def error(self, choice: Mapping[str, str]) -> float:
        """rel-L2 of the model's output with each layer in its format."""
        replaced = {name: self.stored(name, target) for name, target in choice.items()}
        return end_to_end(self.output({}), self.output(replaced)).relative

    def bytes(self, choice: Mapping[str, str]) -> int:
        return sum(self.curves[name].formats[target].bytes for name, target in choice.items())

    def edges(self, few: str, many: str, blocks: int) -> dict[str, str]:
        """The usual list of names: all but the inner blocks, and those, in one format each."""
        inner = tuple(f"blocks.{place}." for place in range(blocks, BLOCKS - blocks))
        return {name: many if name.startswith(inner) else few for name in self.layers}
