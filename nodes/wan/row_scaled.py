"""fp8 weights with one scale per row or block, in the two shapes of ComfyUI's quantised tensors.

ComfyUI's own fp8 layout is made for one scale per tensor: its compiled kernels refuse others, and
a transposed weight would be scaled along the wrong axis. This layout always dequantises to the
compute dtype: w = q * scale, q float8 [out, in], scale float32 in a shape of
kernels/formats/block_scales.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.quant_ops
import torch

from ...kernels.formats import block_scales

NAME = "FrugalRowScaledFP8"


def dequantise(qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights [out, in] in `dtype`, rounded once."""
    return block_scales.dequantise(qdata, scale, dtype)


def quantise(
    weight: torch.Tensor, dtype: torch.dtype, seed: int = 0, like: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] -> (float8 [out, in], float32 scale in the grid of `like`, by default one
    per row); stochastic rounding for a seed above 0.
    """
    if like is None:
        like = weight.new_empty(weight.shape[0], 1)
    scale = block_scales.scale_like(weight, like, torch.finfo(dtype).max)
    scaled = block_scales.divide(weight, scale, dtype)
    rounded = (
        comfy.float.stochastic_rounding(scaled, dtype, seed=seed) if seed else scaled.to(dtype)
    )
    return rounded, scale


def supported() -> bool:
    """Whether this ComfyUI has one of the two kinds of quantised tensor that the layout knows."""
    return hasattr(comfy.quant_ops, "register_layout_class") or hasattr(comfy.quant_ops, "LAYOUTS")


def wrap(module: torch.nn.Module) -> None:
    """Give a loaded linear layer, whose fp8 weight carries a grid of scales, the layout for it."""
    weight: Any = module.weight
    if hasattr(comfy.quant_ops, "register_layout_class"):
        _register()
        old = weight._params
        params = RowScaledFP8.Params(
            scale=old.scale, orig_dtype=old.orig_dtype, orig_shape=old.orig_shape
        )
        wrapped = comfy.quant_ops.QuantizedTensor(weight._qdata, NAME, params)
    else:
        comfy.quant_ops.LAYOUTS.setdefault(NAME, LegacyRowScaledFP8)
        wrapped = comfy.quant_ops.QuantizedTensor(weight._qdata, NAME, dict(weight._layout_params))
    module.layout_type = NAME
    module.weight = torch.nn.Parameter(wrapped, requires_grad=False)


def _register() -> None:
    # Registering twice is harmless: the name is the pack's own.
    comfy.quant_ops.register_layout_class(NAME, RowScaledFP8)


if hasattr(comfy.quant_ops, "register_layout_class"):
    from comfy_kitchen.tensor import BaseLayoutParams

    class RowScaledFP8(comfy.quant_ops.QuantizedLayout):
        """Layout for ComfyUI versions whose quantised tensors come from comfy-kitchen."""

        @dataclass(frozen=True)
        class Params(BaseLayoutParams):
            pass

        @classmethod
        def quantize(cls, tensor, dtype=torch.float8_e4m3fn, stochastic_rounding=0, like=None, **_):
            qdata, scale = quantise(tensor, dtype, stochastic_rounding or 0, like)
            return qdata, cls.Params(
                scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape)
            )

        @classmethod
        def dequantize(cls, qdata, params):
            return dequantise(qdata, params.scale, params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._params.scale

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            return {"": qdata, "_scale": params.scale}

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"dtype": qtensor._qdata.dtype, "like": qtensor._params.scale}


class LegacyRowScaledFP8:
    """Layout for ComfyUI versions that keep their own table of layouts. They do not say what they
    round again: that gets one scale per row.
    """

    @classmethod
    def quantize(cls, tensor, dtype=torch.float8_e4m3fn, stochastic_rounding=0, **_):
        qdata, scale = quantise(tensor, dtype, stochastic_rounding or 0)
        return qdata, {"scale": scale, "orig_dtype": tensor.dtype}

    @staticmethod
    def dequantize(qdata, scale, orig_dtype, **_):
        return dequantise(qdata, scale, orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._layout_params["scale"]
