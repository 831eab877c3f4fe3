"""Measures, in the middle of a run, what share of the model's output depends on each linear layer.

The inputs of one call are cut to a small latent, and the model runs once plainly and once for each
layer with noise added to that layer's weight. The noise acts through the layer's output, out plus
x times noise, so that weights stay untouched wherever they lie and however they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...kernels.errors import FrugalError
from ...kernels.quantize.sensitivity import probe
from .cropped_calls import CLASSES, cut
from .cropped_calls import run as run_small


def check_cancelled() -> None:
    """Raise if the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def refuse(model: torch.nn.Module, inside: Iterable[str]) -> None:
    """Raise FrugalError, before the run, for a diffusion model that cannot be measured. `inside`:
    layers that ComfyUI computes without calling them.
    """
    kind = type(model).__name__
    if kind not in CLASSES:
        raise FrugalError(
            f"a {kind}", f"one of {', '.join(CLASSES)}", "turn measure_layers off for this model"
        )
    unseen = next(iter(inside), None)
    if unseen is not None:
        raise FrugalError(
            f"{unseen} in int8, which is computed without being called",
            "layers that can be disturbed",
            "measure the fp16 or bf16 model, or turn measure_layers off",
        )


def due(options: Mapping[str, Any]) -> bool:
    """Whether a call with these transformer_options is in the second half of the run."""
    now, steps = options.get("sigmas"), options.get("sample_sigmas")
    if now is None or steps is None or len(steps) < 2:
        return True
    return float(now.max()) <= float(steps[(len(steps) - 2) // 2]) * (1 + 1e-4)


@torch.no_grad()
def measure(
    executor: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layers: Mapping[str, Any],
    seed: int,
) -> dict[str, float]:
    """Layer that was called -> relative error energy of the output over that of its weight.

    executor, args, kwargs: those of a DIFFUSION_MODEL wrapper. Runs the model once more than it
    has linear layers, past all other wrappers, and can be cancelled after each.
    """
    args, kwargs = cut(args, kwargs)
    called: set[str] = set()

    def run(differences: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with ExitStack() as hooks:
            for name, layer in layers.items():
                more = differences.get(name)
                if more is None and differences:
                    continue
                handle = layer.register_forward_hook(_disturb(name, more, called))
                hooks.callback(handle.remove)
            return run_small(executor, args, kwargs)

    progress = comfy.utils.ProgressBar(len(layers))

    def step(name: str) -> None:
        check_cancelled()
        progress.update(1)

    readers = [(name, lambda name=name: _weight(name, layers[name])) for name in layers]
    shares = probe(readers, run, seed=seed, step=step)
    return {name: share for name, share in shares.items() if name in called}


def _disturb(name: str, more: torch.Tensor | None, called: set[str]) -> Any:
    def hook(module: Any, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
        called.add(name)
        if more is None:
            return None
        x = given[0]
        if hasattr(x, "dequantize") and hasattr(x, "_qdata"):
            x = x.dequantize()
        return out + torch.nn.functional.linear(x, more.to(x)).to(out)

    return hook


def _weight(name: str, layer: Any) -> torch.Tensor:
    weight = layer.weight.detach()
    if hasattr(weight, "dequantize") and hasattr(weight, "_qdata"):
        weight = weight.dequantize()
    shape = (layer.out_features, layer.in_features)
    if not weight.is_floating_point() or weight.is_meta or tuple(weight.shape) != shape:
        raise FrugalError(
            f"{name} with a weight {tuple(weight.shape)} of {weight.dtype}",
            f"floats {shape}",
            "measure the fp16 or bf16 model, or turn measure_layers off",
        )
    return weight.float().cpu()
