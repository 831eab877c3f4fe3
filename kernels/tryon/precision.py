"""Which layers of CatVTON's UNet are held in 8 bits, and how a file says so.

The matrices of the transformer blocks and the 3 x 3 convolutions between the first and the last
layer: nine tenths of the weights. The rest (1 x 1 convolutions on the residual path, time
embedding, norms, first and last layer) loses more than it saves and stays in floats.

A quantised layer has three tensors: `weight`, `weight_scale` and `comfy_quant`, the JSON
declaration as bytes. Matrices use ComfyUI's formats; convolutions the pack's own, since ComfyUI has
none: int8 or e4m3 [out, in, 3, 3] with float32 scales [out, 1, 1, 1].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import json_text
from ..errors import FrugalError
from ..formats import per_channel
from ..formats.per_channel import FP8, INT8, TYPES

AS_STORED = "as stored"
CHOICES = (AS_STORED, INT8, FP8)
# Below this, what is saved is not worth the error; also ComfyUI handles tiny layers apart.
SMALLEST = 1 << 14
KEPT = re.compile(r"(input_blocks\.0\.0|out\.2)$")
MATRIX = {INT8: "int8_tensorwise", FP8: "float8_e4m3fn"}
KERNEL = {INT8: "frugal_conv_int8", FP8: "frugal_conv_fp8"}
FORMATS = {name: (kind, ndim) for ndim, table in ((2, MATRIX), (4, KERNEL)) for kind, name in
           table.items()}  # fmt: skip
SCALE, DECLARATION = "weight_scale", "comfy_quant"
GET = "use a file written by 'Save CatVTON', or an unquantised one"


@dataclass(frozen=True)
class Layer:
    """How one weight is held: `kind` INT8 or FP8, `ndim` 2 or 4, `rotation` group or 0."""

    kind: str
    ndim: int
    rotation: int = 0

    @property
    def format(self) -> str:
        """The name in the file."""
        return (MATRIX if self.ndim == 2 else KERNEL)[self.kind]

    def declaration(self) -> torch.Tensor:
        """The `comfy_quant` tensor: uint8, JSON."""
        entry: dict[str, Any] = {"format": self.format}
        if self.rotation:
            entry |= {"convrot": True, "convrot_groupsize": self.rotation}
        if self.format == MATRIX[FP8]:
            # Products of fp8 activations with a fixed scale lose more than the weights do.
            entry["full_precision_matrix_mult"] = True
        return torch.tensor(list(json.dumps(entry).encode("ascii")), dtype=torch.uint8)

    def encode(self, weight: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        """Leaf name -> tensor of a float weight; `options` as of `per_channel.encode`."""
        native = self.ndim == 2 and self.kind == FP8
        q, s = per_channel.encode(
            weight, self.kind, rotation=self.rotation, per_tensor=native, **options
        )
        return {"weight": q, SCALE: s, DECLARATION: self.declaration()}


def wanted(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the layer `name` (canonical, without ".weight") of this weight shape is quantised."""
    size = 1
    for extent in shape:
        size *= extent
    if size <= SMALLEST or KEPT.search(name):
        return False
    return (len(shape) == 2 and ".transformer_blocks." in name) or (
        len(shape) == 4 and tuple(shape[2:]) == (3, 3)
    )


def plan(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Layer]:
    """Layer name -> Layer for every wanted weight among tensor names and shapes."""
    if kind not in TYPES:
        raise FrugalError(f"the choice {ascii(kind)[:40]}", f"one of {', '.join(CHOICES)}", GET)
    found = {}
    for name, shape in shapes.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and wanted(layer, shape):
            turn = per_channel.rotation_for(shape[1]) if len(shape) == 2 and kind == INT8 else 0
            found[layer] = Layer(kind, len(shape), turn)
    return found


def declared(tensors: Mapping[str, torch.Tensor], file: str) -> dict[str, Layer]:
    """Layer name -> Layer for every declaration in a file's tensors (canonical names).

    Raises FrugalError for a declaration that is not one of this module's, and where weight, scale
    and declaration contradict each other.
    """
    found = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == DECLARATION:
            found[layer] = made = _read(tensor, f"{file}: {layer}")
            _check(tensors, layer, made, file)
    return found


def _read(tensor: torch.Tensor, where: str) -> Layer:
    try:
        entry = json_text.parse(bytes(tensor.tolist()))
        named = entry["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise FrugalError(f"{where} has an unreadable declaration", "JSON", GET) from error
    if named not in FORMATS:
        raise FrugalError(
            f"{where} is quantised as {ascii(named)[:40]}", f"one of {', '.join(FORMATS)}", GET
        )
    kind, ndim = FORMATS[named]
    known = {"format", "full_precision_matrix_mult", "convrot", "convrot_groupsize"}
    if set(entry) - known:
        raise FrugalError(
            f"{where} has the setting {ascii(sorted(set(entry) - known)[0])[:40]}",
            f"settings among {', '.join(sorted(known))}",
            GET,
        )
    turn = entry.get("convrot_groupsize", 256) if entry.get("convrot") else 0
    sound = isinstance(turn, int) and (turn == 0 or named == MATRIX[INT8])
    if not sound:
        raise FrugalError(f"{where} is {named} with a rotation", "int8 matrices alone rotated", GET)
    return Layer(kind, ndim, turn)


def _check(tensors: Mapping[str, torch.Tensor], name: str, layer: Layer, file: str) -> None:
    weight, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.{SCALE}")
    if weight is None or scale is None:
        raise FrugalError(
            f"{file}: {name} lacks its {'weight' if weight is None else SCALE}", "both", GET
        )
    # ComfyUI's fp8 products take one scale for the whole matrix and would misread a column of them.
    whole = layer.format == MATRIX[FP8]
    shapes = [(), (1,)] if whole else [(), (weight.shape[0], *[1] * (weight.ndim - 1))]
    if weight.dtype != TYPES[layer.kind] or weight.ndim != layer.ndim:
        raise FrugalError(
            f"{file}: {name} is declared {layer.format} and holds {weight.dtype} of shape "
            f"{list(weight.shape)}",
            f"{TYPES[layer.kind]} with {layer.ndim} dimensions",
            GET,
        )
    if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
        raise FrugalError(
            f"{file}: {name} has scales {scale.dtype} of shape {list(scale.shape)}",
            f"float32 of shape {list(shapes[-1])} or []",
            GET,
        )
    if layer.rotation and weight.shape[1] % layer.rotation:
        raise FrugalError(
            f"{file}: {name} has {weight.shape[1]} inputs rotated by {layer.rotation}",
            "a multiple of the rotation",
            GET,
        )


def quantise(
    tensors: dict[str, torch.Tensor], layers: Mapping[str, Layer], **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, those of `layers` quantised one layer at a time and taken out of
    `tensors`; `options` as of `per_channel.encode`, `where` extended by the layer.
    """
    where = options.pop("where", "the model")
    for name in list(tensors):
        tensor = tensors.pop(name)
        layer, _, suffix = name.rpartition(".")
        if suffix != "weight" or layer not in layers:
            yield name, tensor
            continue
        made = layers[layer].encode(tensor, where=f"{where}: {layer}", **options)
        yield from ((f"{layer}.{own}", value) for own, value in made.items())
