"""Calibration files: what the inputs of a model's linear layers looked like while it sampled.

A safetensors file. Metadata `frugal_calibration` is JSON: version, the layers by their canonical
names with the number of the input they saw (layers with one input share a number), the rows counted
per input, how many of them are independent, `meta`, what it was made from, `shares`, where
measured, and `calls` of the model to make again, see reference_calls. Input i has tensors
`i.diagonal` and either `i.correlation` or `i.factor`, see moments.Moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from .. import json_text
from ..checkpoints.header import read_header
from ..errors import FrugalError
from ..tensor_file import write_tensors
from .moments import Moment
from .reference_calls import ReferenceCall, checked, packed, unpacked

MARK = "frugal_calibration"
VERSION = 1
Made = TypeVar("Made")


class Memo:
    """Remembers the last thing made, for layers that share an input."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Made]) -> Made:
        """What was made for this key last time, or made now. The old one is freed first."""
        if self._key != key:
            self._key = self._value = None
            self._value = make()
            self._key = key
        return self._value


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's inputs looked like.

    name: canonical name of the layer. rows: inputs counted. independent: how many of them say
    something of their own, 0 for enough. width: inputs of the layer. key: equal for layers with the
    same input. load: reads the moment. memo: what solvers made of it.
    """

    name: str
    rows: int
    independent: int
    width: int
    key: str
    load: Callable[[], Moment]
    memo: Memo = field(default_factory=Memo)

    def hessian(self) -> torch.Tensor:
        """H = mean of x^T x, float32 [in, in], in the ordinary basis; a new tensor."""
        return self.load().dense()


@dataclass(frozen=True)
class Shares:
    """What importance.probe measured. layers: layer -> share by errors of its weight, the mean over
    `runs` runs; empty, with 0 runs, if it was never measured.
    """

    layers: Mapping[str, float] = field(default_factory=dict)
    runs: int = 0

    def joined(self, other: Shares) -> Shares:
        """Both together, as a mean over all runs; a layer of only one of them keeps its share."""
        runs = self.runs + other.runs
        layers = {**self.layers, **other.layers}
        for name in self.layers.keys() & other.layers.keys():
            total = self.layers[name] * self.runs + other.layers[name] * other.runs
            layers[name] = total / runs
        return Shares(layers, runs)


@dataclass(frozen=True)
class Calibration:
    """A calibration file that is read layer by layer. `inputs`: layer -> number of its input.
    `entries`: those of its calls, which `calls` reads.
    """

    path: Path
    meta: Mapping[str, Any]
    inputs: Mapping[str, int]
    rows: tuple[int, ...]
    independent: tuple[int, ...]
    widths: tuple[int, ...]
    shares: Shares = field(default_factory=Shares)
    entries: tuple[Mapping[str, Any], ...] = ()
    memo: Memo = field(default_factory=Memo)

    def calls(self) -> list[ReferenceCall]:
        """The calls of the model that were kept; none in a file that was made without."""
        with safe_open(self.path, framework="pt", device="cpu") as file:
            return unpacked(self.entries, file.get_tensor)

    def layer(self, name: str) -> LayerStatistics | None:
        """The statistics of a layer by its canonical name; None if it was never seen."""
        index = self.inputs.get(name)
        if index is None:
            return None
        key = f"{self.path}:{index}"
        return LayerStatistics(
            name,
            self.rows[index],
            self.independent[index],
            self.widths[index],
            key,
            lambda: self.moment(index),
            self.memo,
        )

    def moment(self, index: int) -> Moment:
        """The stored moment of an input by its number."""
        with safe_open(self.path, framework="pt", device="cpu") as file:
            held = set(file.keys())
            parts = {
                part: file.get_tensor(f"{index}.{part}")
                for part in ("diagonal", "correlation", "factor")
                if f"{index}.{part}" in held
            }
        return Moment(self.rows[index], **parts, independent=self.independent[index])


def statistics_of(name: str, inputs: torch.Tensor) -> LayerStatistics:
    """Statistics of a layer from its inputs [rows, in] themselves, kept whole in memory."""
    rows = inputs.detach().float()
    total = rows.t() @ rows / len(rows)
    return from_hessian(name, total, len(rows))


def from_hessian(name: str, hessian: torch.Tensor, rows: int = 0) -> LayerStatistics:
    """Statistics of a layer whose H, float32 [in, in], is known as the mean over `rows` independent
    inputs, 0 for enough.
    """

    @dataclass(frozen=True)
    class Whole(LayerStatistics):
        def hessian(self) -> torch.Tensor:
            return hessian.clone()

    def load() -> Moment:
        raise FrugalError("statistics in memory", "the matrix itself", "call hessian()")

    return Whole(name, rows, rows, hessian.shape[0], f"{name}:{id(hessian)}", load)


def write_calibration(
    path: Path,
    inputs: Mapping[str, int],
    moments: Mapping[int, Moment],
    meta: Mapping[str, Any],
    shares: Shares | None = None,
    calls: Sequence[ReferenceCall] = (),
) -> None:
    """Write a calibration file, which appears only whole.

    inputs: layer -> number of its input, 0 to len(moments) - 1. meta: plain JSON values. calls: to
    be made again, without arguments that `reference_calls.unstorable` names.
    """
    if not inputs or sorted({*inputs.values()}) != list(range(len(moments))):
        raise FrugalError(
            f"{len(moments)} inputs of {len(inputs)} layers",
            "a moment for each input of at least one layer",
            "calibrate again",
        )
    tensors: dict[str, torch.Tensor] = {}
    for index, moment in moments.items():
        for part in ("diagonal", "correlation", "factor"):
            value = getattr(moment, part)
            if value is not None:
                tensors[f"{index}.{part}"] = value.contiguous()
    content = {
        "version": VERSION,
        "layers": dict(inputs),
        "rows": [moments[index].rows for index in range(len(moments))],
        "independent": [
            moments[index].independent or moments[index].rows for index in range(len(moments))
        ],
        "meta": dict(meta),
    }
    if shares is not None and shares.runs:
        content["shares"] = {"runs": shares.runs, "layers": dict(shares.layers)}
    if calls:
        held, content["calls"] = packed(calls)
        tensors |= held
    write_tensors(path, tensors, {MARK: json.dumps(content)})


def read_calibration(path: Path | str) -> Calibration:
    """Open a calibration file; its matrices are read when they are asked for.

    Raises FrugalError for another file, a damaged one, or one of a newer version.
    """
    path = Path(path)
    header = read_header(path)
    if MARK not in header.metadata:
        raise FrugalError(
            f"{path.name} holds no {MARK}", "a calibration file", "choose one made by Calibrate"
        )
    try:
        content = json_text.parse(header.metadata[MARK])
        version, meta = content["version"], dict(content["meta"])
        inputs = {str(name): int(index) for name, index in content["layers"].items()}
        rows = tuple(int(count) for count in content["rows"])
        # Files from before this was counted have none.
        alone = tuple(int(count) for count in content.get("independent", rows))
        if len(alone) != len(rows) or min(*alone, 1) < 1:
            raise ValueError("independent")
        held = content.get("shares", {"layers": {}, "runs": 0})
        shares = Shares({k: float(share) for k, share in held["layers"].items()}, int(held["runs"]))
        if not all(math.isfinite(share) and share >= 0 for share in shares.layers.values()):
            raise ValueError("shares")
        entries = checked(content.get("calls", ()), header.tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FrugalError(
            f"{path.name} has damaged entries", "entries written by this pack", "calibrate again"
        ) from error
    if version != VERSION:
        raise FrugalError(
            f"{path.name} has version {ascii(version)[:20]}",
            f"version {VERSION}",
            "update ComfyUI-Frugal, or calibrate again",
        )
    widths = tuple(_width(path.name, header.tensors, index) for index in range(len(rows)))
    if not inputs or not all(0 <= index < len(rows) for index in inputs.values()):
        raise FrugalError(
            f"{path.name} lists inputs it does not hold", "whole statistics", "calibrate again"
        )
    return Calibration(path, meta, inputs, rows, alone, widths, shares, entries)


def _width(name: str, tensors: Mapping[str, Any], index: int) -> int:
    """Inputs of a stored moment, whose shapes must fit each other."""
    shapes = {
        part: tuple(tensors[f"{index}.{part}"].shape)
        for part in ("diagonal", "correlation", "factor")
        if f"{index}.{part}" in tensors
    }
    width = shapes.get("diagonal", (0,))[0]
    whole = shapes.get("correlation") == (width * (width + 1) // 2,)
    sketch = len(shapes.get("factor", ())) == 2 and shapes["factor"][0] == width
    if not width or len(shapes) != 2 or not (whole or sketch):
        raise FrugalError(
            f"{name} holds {shapes} for input {index}",
            "a diagonal and a matrix of one width",
            "calibrate again",
        )
    return width
