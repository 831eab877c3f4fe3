"""GPTQ, AWQ, W4A16 and GGUF weights in the two shapes of ComfyUI's quantised tensors.

The packed words, scales and zero points of the file are kept as they are; a layer is unpacked to
the compute dtype when it runs (kernels/formats/packed_int.py), so products are in full precision.
LoRAs change what was unpacked (patched_on_use.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import comfy.quant_ops
import torch

from ...kernels.formats.packed_int import W4A16, PackedSpec, PackedWeight, dequantise, requantise
from .relayout import relayout

NAME = "FrugalPackedInt"
TYPED = hasattr(comfy.quant_ops, "register_layout_class")


def wrap(module: torch.nn.Module, weight: PackedWeight) -> None:
    """Put a packed weight in the place of a loaded fp8 stand-in of the same layer."""
    stand_in: Any = module.weight
    module.layout_type = NAME
    # A saved model must not be read back as the stand-in's format.
    module.quant_format = NAME
    if TYPED:
        # Registering twice is harmless: the name is the pack's own.
        comfy.quant_ops.register_layout_class(NAME, PackedInt)
        dtype = stand_in._params.orig_dtype
        params = PackedInt.params(weight, dtype)
        wrapped = comfy.quant_ops.QuantizedTensor(weight.words, NAME, params)
    else:
        comfy.quant_ops.LAYOUTS.setdefault(NAME, LegacyPackedInt)
        dtype = stand_in._layout_params["orig_dtype"]
        params = {
            "scale": weight.scales,
            "zeros": weight.zeros,
            "g_idx": weight.g_idx,
            "spec": weight.spec,
            "orig_dtype": dtype,
        }
        wrapped = comfy.quant_ops.QuantizedTensor(weight.words, NAME, params)
    module.set_weight = functools.partial(_set_plain, module, dtype)
    module.weight = torch.nn.Parameter(wrapped, requires_grad=False)


def is_packed(weight: Any) -> bool:
    """Whether a layer's weight is one that `wrap` put there."""
    return NAME in (getattr(weight, "_layout_cls", None), getattr(weight, "_layout_type", None))


def compute_dtype(module: Any) -> torch.dtype:
    """The type that a packed layer is unpacked to."""
    held = module.weight
    return held._params.orig_dtype if TYPED else held._layout_params["orig_dtype"]


def _set_plain(
    module: Any,
    dtype: torch.dtype,
    weight: torch.Tensor,
    inplace_update: bool = False,
    seed: int | None = None,
    return_weight: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """ComfyUI's way to change the weight itself, as hooks do: it is then held in `dtype`, for its
    few bits would lose a weak change.
    """
    made = weight.to(dtype)
    if return_weight:
        return made
    module.weight = torch.nn.Parameter(made, requires_grad=False)
    return None


if TYPED:
    from comfy_kitchen.tensor import BaseLayoutParams

    class PackedInt(comfy.quant_ops.QuantizedLayout):
        """Layout for ComfyUI versions whose quantised tensors come from comfy-kitchen."""

        @dataclass(frozen=True)
        class Params(BaseLayoutParams):
            zeros: torch.Tensor | None
            spec: PackedSpec
            g_idx: torch.Tensor | None = None

            def _tensor_fields(self) -> list[str]:
                return [
                    name for name in ("scale", "zeros", "g_idx") if getattr(self, name) is not None
                ]

        @classmethod
        def quantize(cls, tensor, **_):
            raise NotImplementedError("a packed weight is never rounded to its few bits again")

        @classmethod
        def params(cls, weight: PackedWeight, dtype: torch.dtype):
            return cls.Params(
                scale=weight.scales,
                orig_dtype=dtype,
                orig_shape=(weight.spec.rows, weight.spec.width),
                zeros=weight.zeros,
                spec=weight.spec,
                g_idx=weight.g_idx,
            )

        @classmethod
        def dequantize(cls, qdata, params):
            held = PackedWeight(qdata, params.scale, params.zeros, params.g_idx, params.spec)
            return dequantise(held, params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return tuple(cls.state_dict_tensors(qtensor._qdata, qtensor._params).values())

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            fields = {f"_{name}": getattr(params, name) for name in params._tensor_fields()}
            return {"": qdata, **fields}


def make_patchable(module: Any) -> None:
    """Let a W4A16 layer that ComfyUI itself loaded take patches: comfy-kitchen's layout runs it but
    does not round to it.
    """
    relayout(module, _patchable(module.weight._layout_cls))


@functools.cache
def _patchable(name: str) -> str:
    from comfy_kitchen.tensor import get_layout_class, register_layout_class

    base: Any = get_layout_class(name)

    class Patchable(base):
        @classmethod
        def quantize(cls, tensor, like=None, **_):
            if like is None:
                raise NotImplementedError("a packed weight is only rounded like another one")
            old = like._params
            spec = PackedSpec(W4A16, 4, 0, *old.orig_shape, old.group_size)
            made = requantise(tensor, PackedWeight(like._qdata, old.scale, old.zeros, None, spec))
            changed = {"scale": made.scales, "zeros": made.zeros, "orig_dtype": tensor.dtype}
            return made.words, dataclasses.replace(old, **changed)

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"like": qtensor}

    own = f"Frugal{name}"
    register_layout_class(own, Patchable)
    return own


class LegacyPackedInt:
    """Layout for ComfyUI versions that keep their own table of layouts."""

    @staticmethod
    def dequantize(qdata, scale, zeros, g_idx, spec, orig_dtype, **_):
        return dequantise(PackedWeight(qdata, scale, zeros, g_idx, spec), orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        held = (qtensor._layout_params[name] for name in ("scale", "zeros", "g_idx"))
        return (qtensor._qdata, *(each for each in held if each is not None))
