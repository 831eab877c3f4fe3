"""The chosen precision of products, put on loaded layers.

Expanded layers get a layout of the same name and tensors that has no kernels, so every product of
its weight is that of the expanded weight: ComfyUI hands int8 and 4-bit weights to their kernels
whatever the layer asks for, and a function of its own reads the weight of a layer directly. fp8
layers in low precision get a forward of their own. Patches, offloading and saving stay ComfyUI's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch

from ...kernels.attention.call import capability_of
from ...kernels.checkpoints.matmul_precision import INTEGERS, Matmul, plan_matmul
from ...kernels.device_types import why_no_int8_product
from ...kernels.formats.fp8_linear import Product, choose, fits, fp8_linear
from ...kernels.formats.hardware import INTEGER
from ...kernels.memory.doctor import integer_backend, why_compiled_off, why_plain
from .._comfy import known
from .._kitchen import kitchen_backends
from .relayout import relayout

# Values expanded at a time: the kernels' own expansion takes several times the result.
PIECE = 1 << 24


def planned(plan: Any, choice: str) -> tuple[Matmul, dict[torch.dtype, Product]]:
    """The plan of products for ComfyUI's device and, if layers multiply in fp8, a tried product for
    each of their types. Raises FrugalError for what the device cannot do.
    """
    device = comfy.model_management.get_torch_device()
    card = capability_of(device)
    plain = _through_torch({layer.format for layer in plan.layers.values()}, card)
    unable = why_no_int8_product(device) if plain else ""
    matmul = plan_matmul(plan, choice, card, str(device), plain, unable)
    forms = {plan.layers[name].format for name in matmul.float8}
    types = {getattr(torch, form) for form in forms}
    return matmul, {dtype: choose(device, dtype)[1] for dtype in types}


def _through_torch(forms: set[str], card: tuple[int, int] | None) -> dict[str, str]:
    """The integer formats among these that no kernel of comfy-kitchen multiplies here, and why."""
    backends = kitchen_backends()
    return {
        form: why_compiled_off(torch.version.cuda, card) or why_plain(form, card)
        for form in sorted(forms & set(INTEGER))
        if integer_backend(form, backends, card) is None
    }


def apply(
    matmul: Matmul, products: Mapping[torch.dtype, Product], model: torch.nn.Module
) -> tuple[str, ...]:
    """Put the plan on a loaded model, whose layers have their final weights; returns notes."""
    for name in matmul.expanded:
        _expand(model.get_submodule(name))
    unfit = 0
    for name in matmul.float8:
        module: Any = model.get_submodule(name)
        if fits(*module.weight.shape):
            product = products[module.weight._qdata.dtype]
            module.forward = functools.partial(_forward, module, product)
        else:
            unfit += 1
    if not unfit:
        return ()
    return (f"{unfit} fp8 layers of a shape that fp8 products do not take stay in full precision",)


def _expand(module: Any) -> None:
    module._full_precision_mm = True
    if module.quant_format not in INTEGERS:
        return
    relayout(module, _expanded(module.weight._layout_cls))


@functools.cache
def _expanded(name: str) -> str:
    """Registers the layout `name` without its kernels; the name under which it is known."""
    from comfy_kitchen.tensor import get_layout_class, register_layout_class, register_layout_op
    from comfy_kitchen.tensor.base import dequantize_args

    base: Any = get_layout_class(name)

    class Expanded(base):
        @classmethod
        def dequantize(cls, qdata, params):
            return _in_pieces(base, qdata, params)

    def handler(op):
        # Outside inference mode torch asks for the transpose first; it gets a plain tensor.
        return lambda _, args, kwargs: op(*dequantize_args(args), **dequantize_args(kwargs))

    aten = torch.ops.aten
    for op in (aten.linear.default, aten.t.default, aten.mm.default, aten.addmm.default):
        register_layout_op(op, Expanded)(handler(op))
    own = f"FrugalExpanded{name}"
    register_layout_class(own, Expanded)
    return own


def _in_pieces(layout: Any, qdata: torch.Tensor, params: Any) -> torch.Tensor:
    """What `layout.dequantize` gives, some rows at a time: rows do not depend on each other."""
    rows, width = params.orig_shape
    out = torch.empty(rows, width, dtype=params.orig_dtype, device=qdata.device)
    # A codebook serves all rows, and might have as many values.
    sides = {
        field.name: value
        for field in dataclasses.fields(params)
        if isinstance(value := getattr(params, field.name), torch.Tensor)
        and field.name != "codebook"
        and value.dim()
        and value.shape[0] == rows
    }
    step = max(1, PIECE // width)
    for start in range(0, rows, step):
        span = slice(start, min(start + step, rows))
        shape = (span.stop - span.start, width)
        part = {name: value[span] for name, value in sides.items()}
        own = dataclasses.replace(params, orig_shape=shape, **part)
        out[span] = layout.dequantize(qdata[span], own)
    return out


def _forward(module: Any, product: Product, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A linear layer in fp8; where patches turned its weight into floats, an ordinary one."""
    comfy.ops.run_every_op()
    cast = comfy.ops.cast_bias_weight
    if len(module.weight_function):
        state = cast(module, x, offloadable=True)
    else:
        # Asked for its own type, the weight stays quantised; a patch made while a weight is
        # streamed is then rounded like one that is merged.
        state = cast(
            module,
            dtype=module.weight.dtype,
            device=x.device,
            bias_dtype=x.dtype,
            offloadable=True,
            **known(cast, want_requant=True, compute_dtype=x.dtype),
        )
    weight, bias = state[:2]
    try:
        if not isinstance(weight, comfy.quant_ops.QuantizedTensor):
            return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        held: Any = weight
        scale = held._params.scale if hasattr(held, "_params") else held._layout_params["scale"]
        return fp8_linear(x, held._qdata, scale, bias, product)
    finally:
        comfy.ops.uncast_bias_weight(module, *state)
