"""GPTQ, AWQ and W4A16 weights in the two shapes of ComfyUI's quantised tensors.

The packed words, scales and zero points of the file are kept as they are; a layer is unpacked to
the compute dtype when it runs (see kernels/quant/packed_int.py), so products are in full precision.
A patch such as a LoRA rounds the changed weight to the same layout again.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import comfy.quant_ops
import torch

from ...kernels.quant.packed_int import W4A16, PackedSpec, PackedWeight, dequantise, requantise
from .relayout import relayout

NAME = "FrugalPackedInt"


def wrap(module: torch.nn.Module, weight: PackedWeight) -> None:
    """Put a packed weight in the place of a loaded fp8 stand-in of the same layer."""
    stand_in: Any = module.weight
    module.layout_type = NAME
    # A saved model must not be read back as the stand-in's format.
    module.quant_format = NAME
    if hasattr(comfy.quant_ops, "register_layout_class"):
        # Registering twice is harmless: the name is the pack's own.
        comfy.quant_ops.register_layout_class(NAME, PackedInt)
        wrapped = _tensor(weight, stand_in._params.orig_dtype)
    else:
        comfy.quant_ops.LAYOUTS.setdefault(NAME, LegacyPackedInt)
        wrapped = _legacy_tensor(weight, stand_in._layout_params["orig_dtype"])
        # These versions requantise without the old tensor, which alone knows the groups.
        module.set_weight = functools.partial(_legacy_set_weight, module)
    module.weight = torch.nn.Parameter(wrapped, requires_grad=False)


if hasattr(comfy.quant_ops, "register_layout_class"):
    from comfy_kitchen.tensor import BaseLayoutParams

    class PackedInt(comfy.quant_ops.QuantizedLayout):
        """Layout for ComfyUI versions whose quantised tensors come from comfy-kitchen."""

        @dataclass(frozen=True)
        class Params(BaseLayoutParams):
            zeros: torch.Tensor
            spec: PackedSpec
            g_idx: torch.Tensor | None = None

            def _tensor_fields(self) -> list[str]:
                return ["scale", "zeros"] + ([] if self.g_idx is None else ["g_idx"])

        @classmethod
        def quantize(cls, tensor, like=None, **_):
            if like is None:
                raise NotImplementedError("a packed weight is only rounded like another one")
            made = requantise(tensor, like)
            return made.words, cls.params(made, tensor.dtype)

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
        def packed(cls, qdata, params) -> PackedWeight:
            return PackedWeight(qdata, params.scale, params.zeros, params.g_idx, params.spec)

        @classmethod
        def dequantize(cls, qdata, params):
            return dequantise(cls.packed(qdata, params), params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._params.scale, qtensor._params.zeros

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            index = {} if params.g_idx is None else {"_g_idx": params.g_idx}
            return {"": qdata, "_scale": params.scale, "_zeros": params.zeros, **index}

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"like": cls.packed(qtensor._qdata, qtensor._params)}


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


def _tensor(weight: PackedWeight, dtype: torch.dtype) -> Any:
    params = PackedInt.params(weight, dtype)
    return comfy.quant_ops.QuantizedTensor(weight.words, NAME, params)


class LegacyPackedInt:
    """Layout for ComfyUI versions that keep their own table of layouts."""

    @staticmethod
    def dequantize(qdata, scale, zeros, g_idx, spec, orig_dtype, **_):
        return dequantise(PackedWeight(qdata, scale, zeros, g_idx, spec), orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        params = qtensor._layout_params
        return qtensor._qdata, params["scale"], params["zeros"]


def _legacy_tensor(weight: PackedWeight, dtype: torch.dtype) -> Any:
    params = {
        "scale": weight.scales,
        "zeros": weight.zeros,
        "g_idx": weight.g_idx,
        "spec": weight.spec,
        "orig_dtype": dtype,
    }
    return comfy.quant_ops.QuantizedTensor(weight.words, NAME, params)


def _legacy_set_weight(
    module: Any,
    weight: torch.Tensor,
    inplace_update: bool = False,
    seed: int | None = None,
    return_weight: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    params = module.weight._layout_params
    like = PackedWeight(
        module.weight._qdata, params["scale"], params["zeros"], params["g_idx"], params["spec"]
    )
    made = _legacy_tensor(requantise(weight, like), params["orig_dtype"])
    if return_weight:
        return made
    module.weight = torch.nn.Parameter(made, requires_grad=False)
    return None
