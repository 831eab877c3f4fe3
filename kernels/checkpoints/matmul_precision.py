"""In which precision quantised layers multiply: the choice, what it needs, and its reason.

Full precision expands a layer to the compute type and multiplies there; low precision rounds the
activations too and multiplies in the format of the weights, which saves time on hardware with
matrix units for it, and costs accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FrugalError
from ..formats.hardware import FORMATS, INTEGER, Capability
from .layouts import BLOCK, FLOAT8, MXFP8, NVFP4
from .resolve import Plan

AUTO, FULL, LOW = "auto", "full precision", "low precision"
CHOICES = (AUTO, FULL, LOW)
# ComfyUI's kernels for these round activations whatever the layer asks for.
INTEGERS = tuple(INTEGER)
# ComfyUI runs these in low precision where the device can, unless the layer asks otherwise.
BLOCKS = (NVFP4, MXFP8)


@dataclass(frozen=True)
class Matmul:
    """Layers that leave ComfyUI's default: `expanded` are to be multiplied in the compute type,
    `float8` in fp8 with a scale per token. `notes` are for the report.
    """

    expanded: tuple[str, ...] = ()
    float8: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_matmul(
    plan: Plan,
    choice: str,
    capability: Capability | None,
    device: str,
    plain: Mapping[str, str] = {},
    no_integers: str = "",
) -> Matmul:
    """What `choice`, one of CHOICES, means for a planned file on a device: `capability` is its
    compute capability (None if it is no NVIDIA device), `device` its name for messages. plain:
    integer formats that run through PyTorch there, and why; no_integers: why PyTorch cannot either.

    Raises FrugalError where low precision is asked for and the device lacks matrix units for a
    format, or no layer has a low-precision product.
    """
    if choice not in CHOICES:
        raise FrugalError(
            f"the choice {ascii(choice)[:40]} for matmul",
            f"one of {', '.join(CHOICES)}",
            "choose one of these",
        )
    forms = Counter(layer.format for layer in plan.layers.values())
    if choice == LOW:
        return _low(plan, forms, capability, device, plain if no_integers else {})
    if not forms:
        return Matmul()
    named = tuple(name for name, layer in plan.layers.items() if layer.format in INTEGERS)
    blocks = tuple(name for name, layer in plan.layers.items() if layer.format in BLOCKS)
    if choice == FULL:
        if not named and not blocks:
            return Matmul(notes=("matmul full precision: as all layers of this file do anyway",))
        text = (
            f"matmul full precision: {len(named) + len(blocks)} layers are expanded one at a time "
            "and multiply in the compute type: slower than their own kernels, activations exact"
        )
        return Matmul(expanded=named + blocks, notes=(text,))
    unable = tuple(form for form in plain if no_integers)
    return Matmul(
        expanded=tuple(name for name, layer in plan.layers.items() if layer.format in unable),
        notes=tuple(
            f"matmul auto: {form} layers are expanded one at a time and multiply in the compute "
            f"type, as {device} has no integer matmul ({no_integers})"
            if form in unable
            else _auto(form, capability, plain.get(form, ""))
            for form in forms
        ),
    )


def _auto(form: str, capability: Capability | None, plain: str) -> str:
    if form in INTEGERS:
        text = f"matmul auto: {form} layers multiply as integers, activations rounded per token"
        return text + (f"; this saves memory and little time here: {plain}" if plain else "")
    if form in BLOCKS:
        least = FORMATS[form][1]
        native = capability is not None and capability >= least
        how = "multiply in their format, activations rounded" if native else "are expanded"
        return (
            f"matmul auto: {form} layers {how} (this device: {_text(capability)}, "
            f"needed: {_text(least)})"
        )
    return f"matmul auto: {form} layers multiply in full precision, which suits Wan better"


def _low(
    plan: Plan,
    forms: Counter[str],
    capability: Capability | None,
    device: str,
    unable: Mapping[str, str],
) -> Matmul:
    blocks = Counter(layer.format for layer in plan.layers.values() if layer.grid == BLOCK)
    forms = forms - blocks
    able = [form for form in forms if form in FORMATS]
    if not able:
        held = ", ".join(forms) or (
            "fp8 with a scale per block" if blocks else "no quantised layer"
        )
        raise FrugalError(
            f"{plan.file} holds {held}, which has no low-precision product",
            "fp8 with a scale per tensor or row, int8, W4A8, W4A4, NVFP4 or MXFP8 layers",
            "set matmul to auto, or quantize an unquantised file while loading",
        )
    for form in able:
        least = FORMATS[form][1]
        # Integers also run without matrix units, on the CPU; an old card would only be slower.
        plain = form in INTEGERS and capability is None and form not in unable
        if not plain and (capability is None or capability < least):
            raise FrugalError(
                f"{plan.file} holds {forms[form]} layers in {form}, and {device} has "
                f"{_text(capability)}",
                f"compute capability {_text(least)} or newer for its low-precision product",
                "set matmul to auto or full precision",
            )
    chosen = tuple(
        name
        for name, layer in plan.layers.items()
        if layer.format in FLOAT8.values() and layer.grid != BLOCK
    )
    notes = [
        f"matmul low precision: {forms[form]} layers in {form} multiply in their format; "
        + ("activations are rounded to e4m3 with a scale per token and "
           if form in FLOAT8.values() else "")
        + f"{device} has {_text(capability)}"
        for form in able
    ]  # fmt: skip
    if blocks:
        notes.append(f"{blocks.total()} fp8 layers with a scale per block stay in full precision")
    others = sum(count for form, count in forms.items() if form not in able)
    if others:
        notes.append(f"{others} layers have no low-precision product and stay in full precision")
    return Matmul(float8=chosen, notes=tuple(notes))


def _text(capability: Capability | None) -> str:
    return "none" if capability is None else "{}.{}".format(*capability)
