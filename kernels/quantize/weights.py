"""A Wan file as weights, one layer at a time: what it stores, and the floats that this stands for.

Nothing is kept in memory: tensors of a safetensors file are views of its mapping, whose pages are
given back by `release`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints.header import TensorInfo
from ..checkpoints.layouts import FLOAT8, INT8, MXFP8, NVFP4, ONE, PLAIN, W4A4, W4A8, LayerLayout
from ..checkpoints.normalise import normalise
from ..checkpoints.packed import PACKED
from ..checkpoints.resolve import Plan, Structure, plan_wan
from ..checkpoints.source import Source, open_source
from ..formats import block_scales, codec
from ..formats import table as formats
from ..formats.packed_int import PackedWeight, dequantise
from .on_load import LARGE

KITCHEN = {
    W4A4: "TensorCoreConvRotW4A4Layout",
    NVFP4: "TensorCoreNVFP4Layout",
    MXFP8: "TensorCoreMXFP8Layout",
}


class Weights:
    """The weights of one Wan file, by canonical name.

    `plan` and `source` are what the loader makes of the file, `structure` is as for plan_wan.
    Raises FrugalError where the loader would.
    """

    def __init__(self, path: str | os.PathLike[str], structure: Structure | None = None):
        self.path = Path(path)
        self.source: Source = open_source(self.path, None)
        self.plan: Plan = plan_wan(
            self.source.name,
            self.source.tensors,
            self.source.metadata,
            self.source.value,
            structure,
        )
        self._held = self.source.loaded or _Mapped(self.source)
        self._raw: dict[str, dict[str, str]] = {}
        for raw, name in self.plan.rename.items():
            layer, _, suffix = name.rpartition(".")
            own = layer if layer in self.plan.layers and suffix != "bias" else name
            self._raw.setdefault(own, {})[raw] = name
        table = self.plan.table
        self.shapes: dict[str, tuple[int, int]] = {
            name.removesuffix(".weight"): (entry.shape[0], entry.shape[1])
            for name, entry in table.items()
            if entry.linear
        }
        self._names = [*table, *self.plan.preferences]

    def units(self) -> Iterator[str]:
        """What is written together, in the order of the model: a linear layer's name for its weight
        with all that belongs to it, a tensor's name for everything else.
        """
        for name in self._names:
            layer = name.removesuffix(".weight")
            yield layer if layer in self.shapes else name

    def large(self) -> list[str]:
        """The linear layers of the blocks, which hold nearly all weights."""
        return [layer for layer in self.shapes if LARGE.match(layer)]

    def layout(self, layer: str) -> LayerLayout | None:
        """How a linear layer is quantised in the file; None for floats."""
        return self.plan.layers.get(layer)

    def stored(self, unit: str) -> dict[str, torch.Tensor]:
        """The tensors of a unit as the loader hands them on: canonical name -> tensor, views of the
        file where nothing had to change.
        """
        layout = self.plan.layers.get(unit)
        own = self._raw.get(unit) or self._raw[f"{unit}.weight"]
        part = replace(self.plan, rename=own, layers={unit: layout} if layout is not None else {})
        return normalise(part, self._held)

    def plain(self, unit: str) -> bool:
        """Whether a unit is one float tensor that goes over bit by bit."""
        raw = self._raw.get(unit) or self._raw[f"{unit}.weight"]
        kinds = {self.source.tensors[name].dtype for name in raw}
        return unit not in self.plan.layers and not kinds & set(FLOAT8)

    def infos(self, unit: str) -> dict[str, TensorInfo]:
        """Type and shape of what `stored` gives, without reading where nothing is changed."""
        if self.plain(unit):
            own = self._raw.get(unit) or self._raw[f"{unit}.weight"]
            return {name: self.source.tensors[raw] for raw, name in own.items()}
        return {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.stored(unit).items()
        }

    def weight(self, layer: str) -> torch.Tensor:
        """The weight [out, in] of a linear layer: as stored where the file holds floats, else
        float32, decoded in pieces. Not to be written to.
        """
        layout = self.plan.layers.get(layer)
        held = self.stored(layer)
        if layout is None:
            return held[f"{layer}.weight"]
        by_suffix = {name.removeprefix(f"{layer}."): tensor for name, tensor in held.items()}
        return decoded(layout, by_suffix, self.shapes[layer])

    def release(self, unit: str) -> None:
        """Give back the memory in which a unit's part of the file was read."""
        if isinstance(self._held, _Mapped):
            for raw in self._raw.get(unit) or self._raw[f"{unit}.weight"]:
                self._held.release(raw)


def decoded(
    layout: LayerLayout, by_suffix: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> torch.Tensor:
    """The float32 weight [out, in] of a quantised layer from its normalised tensors (suffix ->
    tensor), those that `normalise` gives.
    """
    form, options = layout.format, layout.options
    if form in PACKED:
        assert layout.packed is not None
        packed = PackedWeight(
            by_suffix["weight"],
            by_suffix.get("weight_scale"),
            by_suffix.get("weight_zeros"),
            by_suffix.get("weight_g_idx"),
            layout.packed,
        )
        return dequantise(packed, torch.float32)
    if form in FLOAT8.values():
        return block_scales.dequantise(
            by_suffix["weight"], by_suffix["weight_scale"], torch.float32
        )
    rotation = options.get("convrot_groupsize", 256)
    if form == INT8:
        if not options.get("convrot"):
            return by_suffix["weight"].float() * by_suffix["weight_scale"].float()
        scale = by_suffix["weight_scale"].reshape(-1, 1).expand(shape[0], 1)
        given = {"weight": by_suffix["weight"], "weight_scale": scale}
        settings = {"format": form, "convrot": True, "convrot_groupsize": rotation}
        return codec.decode(formats.INT8, given, settings, shape)
    if form == formats.FORMATS[formats.AWQ]:
        settings = {"format": form, "group_size": options.get("group_size", 64)}
        return codec.decode(formats.AWQ, by_suffix, settings, shape)
    if form == W4A8:
        group = options.get("group_size", 16)
        settings = {"format": form, "group_size": group, "convrot_groupsize": rotation}
        return codec.decode(formats.W4A8, by_suffix, settings, shape)
    kind = codec.kitchen(KITCHEN[form])
    common = {"orig_dtype": torch.float32, "orig_shape": shape}
    scale = by_suffix["weight_scale"]
    if form == NVFP4:
        blocks = scale.view(torch.float8_e4m3fn)
        params = kind.Params(scale=by_suffix["weight_scale_2"], block_scale=blocks, **common)
    elif form == MXFP8:
        params = kind.Params(scale=scale.view(torch.float8_e8m0fnu), **common)
    else:
        params = kind.Params(scale=scale, convrot_groupsize=rotation, **common)
    out = kind.dequantize(by_suffix["weight"], params).float()
    # Smoothing factors multiply the inputs, which is the same as multiplying columns.
    return out * by_suffix["pre_quant_scale"].float() if "pre_quant_scale" in by_suffix else out


def label(layout: LayerLayout | None, shape: tuple[int, int]) -> str | None:
    """The target of formats/table.py that a layer is stored in already, None if it is another."""
    if layout is None or layout.format == PLAIN or layout.grid != ONE or layout.lightx2v:
        return None
    if layout.format == formats.FORMATS[formats.FP8]:
        return formats.FP8
    for target, form in formats.FORMATS.items():
        if form == layout.format and not formats.suits(target, shape):
            wanted = {k: v for k, v in formats.options(target, shape).items() if k != "format"}
            if wanted == dict(layout.options):
                return target
    return None


class _Mapped(Mapping[str, torch.Tensor]):
    """Tensor name -> view of the mapped safetensors file, made at each look-up."""

    def __init__(self, source: Source):
        self._source = source
        self._maps: dict[Path, mmap.mmap] = {}
        for path in source.files:
            with path.open("rb") as file:
                # Copy on write, though nothing writes: torch takes no read-only memory quietly.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._source.tensors[name]
        if not info.numel:
            return torch.empty(info.shape, dtype=info.dtype)
        data = self._maps[self._source.owner[name]]
        if info.start % info.dtype.itemsize:
            raw = bytearray(data[info.start : info.end])
            return torch.frombuffer(raw, dtype=info.dtype).reshape(info.shape)
        flat = torch.frombuffer(data, dtype=info.dtype, count=info.numel, offset=info.start)
        return flat.reshape(info.shape)

    def release(self, name: str) -> None:
        info = self._source.tensors[name]
        page = mmap.PAGESIZE
        start, end = -(-info.start // page) * page, info.end // page * page
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[self._source.owner[name]].madvise(mmap.MADV_DONTNEED, start, end - start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)
