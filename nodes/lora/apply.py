"""Which change of a LoRA file goes beside a layer, which into an unquantised parameter, and which
can go nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

from ...kernels.errors import FrugalError
from ...kernels.lora import low_rank
from ...kernels.lora.low_rank import Delta
from ...kernels.lora.report import LoraReport
from .._comfy import compute_dtype, for_each_expert
from .file import Entry, LoraFile
from .unmerged_run import SideLayer, Vectors, attach, dora_vectors, fuses, side_lora, stored

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MERGE = "merge it before quantising, or use ComfyUI's LoRA loader"


class NotBesideError(Exception):
    """Why a change cannot be applied unmerged."""


@dataclass
class _Change:
    """What one layer gets from one file."""

    deltas: list[tuple[Delta, tuple[int, int] | None]]
    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    kept: torch.Tensor | None = None


def apply(model: Any, file: LoraFile, strength: float) -> tuple[Any, LoraReport]:
    """A clone of `model` (ModelPatcher) with the LoRA, on both experts if it is two, and what
    became of its keys. Raises FrugalError if none of them fits.
    """
    reports: list[LoraReport] = []
    return _apply(model, file, strength, reports), reports[0]


@for_each_expert
def _apply(model: Any, file: LoraFile, strength: float, reports: list[LoraReport]) -> Any:
    changes: dict[str, _Change] = {}
    patches: dict[Any, Any] = {}
    exchanged: dict[str, torch.Tensor] = {}
    left = dict(file.unplaced)
    beside = inside = 0
    for entry in file.entries:
        try:
            _put_beside(model, entry, changes)
            beside += len(entry.keys)
        except NotBesideError as reason:
            if _is_loose(model.model, entry):
                exchanged[entry.name] = entry.patch[1][0]
                beside += len(entry.keys)
            elif _fits_inside(model, entry):
                patches[entry.target] = entry.patch
                inside += len(entry.keys)
            else:
                left |= dict.fromkeys(entry.keys, f"{reason}; {MERGE}")
    if not beside + inside:
        key, reason = next(iter(left.items()), ("", "the file is empty"))
        raise FrugalError(
            f"{file.name} has {file.count} keys and none that fits "
            f"({ascii(key)[1:-1][:80]}: {reason.partition(';')[0]})",
            f"a LoRA for this {type(model.model).__name__} model",
            "choose a LoRA that was trained on it",
        )
    dtype = compute_dtype(model.model)
    layers = {path: _layer(change, dtype) for path, change in changes.items()}
    size = sum(p.nbytes for layer in layers.values() for p in layer.parameters())
    report = LoraReport(
        file.name, strength, file.count, beside, inside, left, len(layers), size, file.others,
        file.scaled,
    )  # fmt: skip
    reports.append(report)
    if strength == 0:
        return model.clone()
    if layers:
        model = attach(model, side_lora(model, file.name, strength, layers))
    if patches or exchanged:
        model = model.clone()
    for name, change in exchanged.items():
        held = model.get_model_object(name)
        value = held.detach().float() + strength * change.to(held.device, torch.float32)
        value = torch.nn.Parameter(value.to(held.dtype), requires_grad=False)
        model.add_object_patch(name, value)
    if patches:
        refused = set(patches) - set(model.add_patches(patches, strength))
        if refused:
            raise FrugalError(
                f"ComfyUI did not take {len(refused)} changes (first {min(map(str, refused))})",
                "a parameter of the model for each",
                "report the file to ComfyUI-Frugal",
            )
    return model


def _put_beside(model: Any, entry: Entry, changes: dict[str, _Change]) -> None:
    path, _, suffix = entry.name.rpartition(".")
    module = _module(model.model, path)
    if not _is_linear(module) or getattr(module, suffix, None) is None:
        raise NotBesideError("not in a linear layer of this model")
    if _computed_inside(model.model, path, module):
        raise NotBesideError("ComfyUI computes this int8 layer inside another")
    change = changes.get(path) or _Change([])
    if suffix == "bias" and entry.part is None and _is_diff(entry.patch, (module.out_features,)):
        tensor = entry.patch[1][0].float()
        change.bias = tensor if change.bias is None else change.bias + tensor
    elif suffix == "weight":
        _put_weight(model, entry, module, change)
    else:
        raise NotBesideError("no change that a layer's output can take")
    changes[path] = change


def _put_weight(model: Any, entry: Entry, module: Any, change: _Change) -> None:
    delta, magnitude = delta_of(entry.patch)
    wanted, place = [module.out_features, module.in_features], None
    if entry.part is not None:
        axis, start, length = entry.part
        wanted[axis], place = length, (axis, start)
    if not isinstance(entry.target, str) and len(entry.target) > 2 and entry.target[2]:
        raise NotBesideError("ComfyUI rearranges the change before it is added")
    if delta.shape != tuple(wanted):
        raise NotBesideError(f"shape {list(delta.shape)} for a layer of {wanted}")
    if magnitude is not None:
        if place is not None or delta.outer or magnitude.shape[0] != module.out_features:
            raise NotBesideError("a DoRA magnitude that is not one for each output")
        if change.gain is not None or entry.name in model.patches:
            raise NotBesideError("a DoRA magnitude on a weight that something else changes")
        delta, gain, change.kept = dora_vectors(*_weight(model, entry.name), delta, magnitude)
        change.gain = gain
    change.deltas.append((delta, place))


def delta_of(patch: Any) -> tuple[Delta, torch.Tensor | None]:
    """The factors of an adapter and its DoRA magnitude; the order of `weights` is ComfyUI's."""
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, middle, magnitude, reshape = patch.weights
        if middle is not None or reshape is not None:
            raise NotBesideError("a LoRA that is made for convolutions or for another shape")
        return low_rank.lora(up.flatten(1), down.flatten(1), alpha), magnitude
    if isinstance(patch, LoHaAdapter):
        a1, b1, alpha, a2, b2, t1, t2, magnitude = patch.weights
        delta = None if (t1, t2) != (None, None) else low_rank.loha((a1, b1), (a2, b2), alpha)
        if delta is None:
            raise NotBesideError("a LoHa that takes as much as the weight itself")
        return delta, magnitude
    if isinstance(patch, LoKrAdapter):
        w1, w2, alpha, a1, b1, a2, b2, t2, magnitude = patch.weights
        if t2 is not None or (w2 is not None and w2.dim() > 2):
            raise NotBesideError("a LoKr that is made for convolutions")
        outer = (a1, b1) if w1 is None else (w1,)
        return low_rank.lokr(outer, (a2, b2) if w2 is None else (w2,), alpha), magnitude
    name = getattr(patch, "name", None) or f"a whole '{patch[0]}'"
    raise NotBesideError(f"{name} of a weight is no low-rank change")


def _is_loose(model: torch.nn.Module, entry: Entry) -> bool:
    """Whether this is the change of a parameter beside layers in one module, as Wan's modulation:
    ComfyUI takes patches of such parameters and never applies them.
    """
    path, _, suffix = entry.name.rpartition(".")
    module = _module(model, path)
    parameter = getattr(module, suffix, None)
    if type(parameter) is not torch.nn.Parameter or parameter.dtype not in FLOATS:
        return False
    own = sum(1 for _ in module.parameters(recurse=False))
    loose = own < sum(1 for _ in module.parameters())
    return loose and entry.part is None and _is_diff(entry.patch, tuple(parameter.shape))


def _fits_inside(model: Any, entry: Entry) -> bool:
    """Whether ComfyUI can change the parameter itself without rounding it to a quantised form."""
    path, _, suffix = entry.name.rpartition(".")
    parameter = getattr(_module(model.model, path), suffix, None)
    plain = type(parameter) in (torch.nn.Parameter, torch.Tensor)
    if not plain or parameter.dtype not in FLOATS:
        return False
    if isinstance(entry.patch, tuple):
        return entry.part is not None or tuple(entry.patch[1][0].shape) == tuple(parameter.shape)
    if isinstance(entry.patch, LoRAAdapter) and entry.part is None:
        up, down, *_, reshape = entry.patch.weights
        fits = up.shape[0] * down[0].numel() == parameter.numel()
        return fits or reshape is not None or entry.patch.weights[3] is not None
    return True


def _layer(change: _Change, dtype: torch.dtype) -> SideLayer:
    layer = SideLayer()
    for delta, place in change.deltas:
        layer.add_delta(delta, place, dtype)
    vectors = (change.bias, change.gain, change.kept)
    if any(vector is not None for vector in vectors):
        bias = None if change.bias is None else stored(change.bias, dtype)
        layer.vectors = Vectors(bias, change.gain, change.kept)
    return layer


def _module(model: torch.nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_linear(module: Any) -> bool:
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and not hasattr(module, "in2_features")


def _is_diff(patch: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(patch, tuple) and patch[0] == "diff" and tuple(patch[1][0].shape) == shape


def _computed_inside(model: torch.nn.Module, path: str, module: Any) -> bool:
    """Whether a parent of another kind than `fuses` handles computes this int8 layer itself."""
    if getattr(module.weight, "_layout_cls", None) != "TensorWiseINT8Layout":
        return False
    while path := path.rpartition(".")[0]:
        parent = model.get_submodule(path)
        code = getattr(type(parent).forward, "__code__", None)
        if code is not None and "linear_input_act" in code.co_names:
            return not (fuses(parent) and module in parent.children())
    return False


def _weight(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [out, in] in float32, dequantised, on the model's device, bias or None), both as
    they were loaded.
    """
    path = name.rpartition(".")[0]
    module = model.model.get_submodule(path)
    saved = model.backup.get(name)
    weight = comfy.utils.get_attr(model.model, name) if saved is None else saved.weight
    if hasattr(weight, "_qdata"):
        weight = weight.dequantize()
    elif type(weight) not in (torch.nn.Parameter, torch.Tensor):
        raise NotBesideError("a DoRA magnitude on a weight in a form of another pack")
    weight = weight.detach().to(model.load_device, torch.float32)
    if hasattr(module, "convert_weight"):
        weight = module.convert_weight(weight)
    saved = model.backup.get(f"{path}.bias")
    return weight, module.bias if saved is None else saved.weight
