"""Checks of a loaded Wan model against the weights that its file stands for, inside ComfyUI."""

from __future__ import annotations

import comfy.sd
import torch

from frugal.kernels.checkpoints.wan_shapes import parameters
from frugal.tests.helpers import wan as bed


def forward(patcher, config=bed.T2V) -> torch.Tensor:
    model = patcher.model.diffusion_model
    dtype = (
        patcher.model.get_dtype_inference()
        if hasattr(patcher.model, "get_dtype_inference")
        else torch.float32
    )
    arguments = bed.inputs(config)
    return model(
        **{
            key: value.to(dtype) if key in ("x", "context") else value
            for key, value in arguments.items()
        }
    )


def reference(weights: bed.Weights, config=bed.T2V) -> torch.Tensor:
    """The output of ComfyUI's own fp32 model that holds exactly these weights."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.float() for name, tensor in weights.items()},
        model_options={"dtype": torch.float32},
    )
    held = dict(patcher.model.diffusion_model.named_parameters())
    assert all(torch.equal(held[name], weights[name]) for name in parameters(config))
    with torch.inference_mode():
        return forward(patcher, config)


def loaded_weights(patcher) -> bed.Weights:
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        value = parameter.dequantize() if hasattr(parameter, "_qdata") else parameter
        found[name] = value.detach().float()
    return found


def check(patcher, meant, config=bed.T2V, tolerance=2e-3, least=0.999) -> None:
    held = loaded_weights(patcher)
    for name, expected in meant.items():
        assert bed.relative(held[name], expected) <= 1e-6, name
    expected = reference(meant, config)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = forward(patcher, config)
        assert bed.relative(out, expected) <= tolerance
        assert bed.correlation(out, expected) >= least
