"""Layers with 8-bit weights inside ComfyUI's UNet, in the two shapes of its quantised tensors.

Matrices go into ComfyUI's own quantised layer where it has the format. Convolutions, and matrices
in a ComfyUI without the format, go into the weight-only layers below: the weight stays in 8 bits
and is decoded to the compute dtype while the layer runs. Patches such as a LoRA are applied to the
decoded weight and rounded back stochastically, and ComfyUI puts the untouched weight back.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch

from ...kernels.errors import FrugalError
from ...kernels.formats import per_channel
from ...kernels.tryon.precision import DECLARATION, FORMATS, SCALE, Layer
from .._comfy import known, round_patched

NAME = "FrugalPerChannel"
# Registration came with comfy-kitchen's tensors; before, ComfyUI kept its own table.
NEW = hasattr(comfy.quant_ops, "register_layout_class")


if NEW:
    try:
        from comfy_kitchen.tensor import BaseLayoutParams
    except ImportError as missing:
        raise FrugalError(
            "comfy-kitchen is not installed",
            "the quantised tensors that ComfyUI takes from it",
            "install ComfyUI's requirements, or set quantize to 'as stored'",
        ) from missing

    class PerChannel(comfy.quant_ops.QuantizedLayout):
        """Layout for ComfyUI versions whose quantised tensors come from comfy-kitchen."""

        @dataclass(frozen=True)
        class Params(BaseLayoutParams):
            kind: str = per_channel.INT8
            rotation: int = 0

        @classmethod
        def quantize(cls, tensor, kind=per_channel.INT8, rotation=0, stochastic_rounding=0, **_):
            layer = Layer(kind, tensor.ndim, rotation)
            # What is patched while it is streamed is rounded at each use: nothing may wait there.
            coded = layer.encode(tensor, seed=stochastic_rounding or None, check=False)
            scale = coded[SCALE]
            return coded["weight"], cls.params(scale, tensor.dtype, tensor.shape, kind, rotation)

        @classmethod
        def params(cls, scale, dtype, shape, kind, rotation):
            return cls.Params(
                scale=scale,
                orig_dtype=dtype,
                orig_shape=tuple(shape),
                kind=kind,
                rotation=rotation,
            )

        @classmethod
        def dequantize(cls, qdata, params):
            return per_channel.decode(qdata, params.scale, params.orig_dtype, params.rotation)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._params.scale

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            return {"": qdata, "_scale": params.scale}

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"kind": qtensor._params.kind, "rotation": qtensor._params.rotation}

    # Registering twice is harmless: the name is the pack's own.
    comfy.quant_ops.register_layout_class(NAME, PerChannel)
elif hasattr(comfy.quant_ops, "LAYOUTS"):

    class LegacyPerChannel:
        """Layout for ComfyUI versions that keep their own table of layouts."""

        @staticmethod
        def dequantize(qdata, scale, orig_dtype, rotation=0, **_):
            return per_channel.decode(qdata, scale, orig_dtype, rotation)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._layout_params["scale"]

    comfy.quant_ops.LAYOUTS.setdefault(NAME, LegacyPerChannel)
else:
    raise FrugalError(
        "this ComfyUI has no quantised tensors",
        "0.3.75 or newer",
        "update ComfyUI, or set quantize to 'as stored'",
    )


def _tensor(q: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, layer: Layer) -> Any:
    if NEW:
        params: Any = PerChannel.params(s, dtype, q.shape, layer.kind, layer.rotation)
    else:
        params = {"scale": s, "orig_dtype": dtype, "rotation": layer.rotation}
    return comfy.quant_ops.QuantizedTensor(q, NAME, params)


def is_quantised(weight: Any) -> bool:
    """Whether a tensor is one of ComfyUI's quantised tensors."""
    return isinstance(weight, comfy.quant_ops.QuantizedTensor)


def stored_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` and `weight_scale` of one of ComfyUI's quantised tensors, the pack's or its own."""
    if NEW:
        return {"weight": weight._qdata, SCALE: weight._params.scale}
    return {"weight": weight._qdata, SCALE: weight._layout_params["scale"]}


class _WeightOnly:
    """What both weight-only layers add to ComfyUI's casting layer; `layer` says how it is held."""

    layer: Layer
    compute_dtype: torch.dtype

    def _load_from_state_dict(
        self: Any, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        own = {name[len(prefix) :]: t for name, t in state_dict.items() if name.startswith(prefix)}
        expected = {"weight", SCALE, DECLARATION} | ({"bias"} if self.bias is not None else set())
        missing += [prefix + suffix for suffix in sorted(expected - own.keys())]
        unexpected += [prefix + suffix for suffix in sorted(own.keys() - expected)]
        if expected - own.keys():
            return
        for suffix in {"weight", "bias"} & expected:
            if own[suffix].shape != getattr(self, suffix).shape:
                errors.append(f"{prefix}{suffix} has the shape {list(own[suffix].shape)}")
                return
        held = _tensor(own["weight"], own[SCALE], self.compute_dtype, self.layer)
        self.weight = torch.nn.Parameter(held, requires_grad=False)
        if self.bias is not None:
            # A copy: the given one may lie in a mapped file, which must not be written to.
            bias = own["bias"].to(dtype=self.bias.dtype, copy=True)
            self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def state_dict(self: Any, *_, destination=None, prefix="", **__):
        """The layer's tensors as they stand in a file, so that memory is counted and saved so."""
        held = {} if destination is None else destination
        if self.weight.is_meta:
            return held
        own = stored_tensors(self.weight) | {DECLARATION: self.layer.declaration()}
        held.update({prefix + suffix: tensor for suffix, tensor in own.items()})
        if self.bias is not None:
            held[f"{prefix}bias"] = self.bias
        return held

    def _apply(self: Any, fn, recurse=True):
        # torch would set the outer tensor's data alone and leave the 8-bit data behind.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = torch.nn.Parameter(fn(parameter), requires_grad=False)
        return self

    def convert_weight(self: Any, weight, inplace=False, **_):
        if not is_quantised(weight):
            return weight
        if NEW:
            return weight.dequantize()
        # These versions drop the wider dtype that was asked for; patches need it.
        params = weight._layout_params
        return per_channel.decode(weight._qdata, params["scale"], torch.float32, params["rotation"])

    def set_weight(self: Any, weight, inplace_update=False, seed=None, return_weight=False, **_):
        if inplace_update:
            # ComfyUI's hooks would afterwards restore the 8-bit values and not their scales.
            raise FrugalError(
                "a hook changes quantised weights while sampling",
                "a LoRA that stays the same for the whole run",
                "use a LoRA loader, or load the model with quantize 'as stored'",
            )
        coded = self.layer.encode(weight, seed=seed or None)
        made = _tensor(coded["weight"], coded[SCALE], self.compute_dtype, self.layer)
        if return_weight:
            return made
        self.weight = torch.nn.Parameter(made, requires_grad=False)
        return None

    def forward_comfy_cast_weights(self: Any, input):
        # Asked for in its own type, the weight arrives in 8 bits; with patches it may be decoded.
        # Where it is patched on the way and kept on the device, it is rounded at the first use too.
        cast = comfy.ops.cast_bias_weight
        weight, bias, stream = cast(
            self,
            dtype=self.weight.dtype,
            device=input.device,
            bias_dtype=input.dtype,
            offloadable=True,
            **known(cast, want_requant=True, compute_dtype=input.dtype),
        )
        try:
            if is_quantised(weight):
                q, s = stored_tensors(weight).values()
                plain = per_channel.decode(q, s, input.dtype, self.layer.rotation)
            else:
                plain = weight.to(input.dtype)
            return self.product(input, plain, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


class WeightOnlyConv2d(_WeightOnly, comfy.ops.manual_cast.Conv2d):
    """A 2D convolution, weight [out, in, kh, kw] in 8 bits."""

    def product(self, input, weight, bias):
        return self._conv_forward(input, weight, bias)


class WeightOnlyLinear(_WeightOnly, comfy.ops.manual_cast.Linear):
    """A linear layer, weight [out, in] in 8 bits."""

    def product(self, input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)


def native(layer: Layer) -> bool:
    """Whether the running ComfyUI itself has a layer for this format."""
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    return NEW and layer.ndim == 2 and layer.format in algorithms


def install(
    unet: torch.nn.Module,
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put quantised layers, still without weights, in the places named by `layers`.

    dtype is that of the biases, compute_dtype that of the decoded weights, `device` the one the
    model will run on, which decides on ComfyUI's kernels.
    """
    own: Any = None
    for name, layer in layers.items():
        old = unet.get_submodule(name)
        bias = _has_bias(old)
        if native(layer) and own is None:
            own = _native_operations(dtype, compute_dtype, device)
        if isinstance(old, torch.nn.Conv2d) and layer.ndim == 4:
            made: Any = WeightOnlyConv2d(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                stride=old.stride,
                padding=old.padding,
                dilation=old.dilation,
                groups=old.groups,
                bias=bias,
                device="meta",
                dtype=dtype,
            )
        elif isinstance(old, torch.nn.Linear) and layer.ndim == 2:
            kind = own.Linear if native(layer) else WeightOnlyLinear
            place = None if native(layer) else "meta"
            made = kind(old.in_features, old.out_features, bias=bias, device=place, dtype=dtype)
        else:
            raise FrugalError(
                f"{name} is a {type(old).__name__} declared {layer.format}",
                "a matrix or a convolution as declared",
                "use a file written by 'Save CatVTON'",
            )
        if isinstance(made, _WeightOnly):
            made.layer, made.compute_dtype = layer, compute_dtype
        else:
            round_patched(made)
        comfy.utils.set_attr(unet, name, made)


def _has_bias(layer: Any) -> bool:
    """Whether a layer of ComfyUI's has a bias, or will have: with dynamic VRAM a linear layer is
    without its tensors until a state dict brings them.
    """
    return layer.bias is not None or getattr(layer, "comfy_need_lazy_init_bias", False)


def _native_operations(dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device) -> Any:
    # Any non-empty configuration makes ComfyUI choose its quantised layers and the kernels that
    # the device has.
    wish = types.SimpleNamespace(quant_config={"mixed_ops": True})
    made = comfy.ops.pick_operations(
        dtype, compute_dtype, **known(comfy.ops.pick_operations, load_device=device),
        model_config=wish,
    )  # fmt: skip
    if not hasattr(comfy.ops, "mixed_precision_ops") or not hasattr(made, "_quant_config"):
        raise FrugalError(
            "this ComfyUI does not offer its quantised layers",
            "'mixed_precision_ops'",
            "update ComfyUI, or set quantize to 'as stored'",
        )
    return made


def layer_of(module: Any) -> Layer:
    """How a module made by `install` holds its weight."""
    if isinstance(module, _WeightOnly):
        return module.layer
    kind, ndim = FORMATS[module.quant_format]
    params = module.weight._params
    turned = getattr(params, "convrot", False)
    return Layer(kind, ndim, params.convrot_groupsize if turned else 0)
