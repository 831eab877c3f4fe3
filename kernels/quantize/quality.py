"""What a quantised file lost: by layer, by block and end to end, as data, JSON and text.

rel-L2 is ||error|| / ||output||, cosine that between both outputs, SNR -20 log10(rel-L2) in dB, all
of a layer's own output over its calibration inputs (exact from their second moments, see
`curves`). Without calibration they are those of the weights alone, which is said.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import json_text
from ..atomic_write import atomic_write
from ..errors import FrugalError
from ..formats import table as formats
from .budget import Allocation, gigabytes
from .curves import FormatError, LayerCurve, Statistics, stored_error
from .model_error import ModelError, from_dict
from .sensitivity import BLOCK

SUFFIX = ".quality.json"
ALONE = "errors are those of the weights alone: no inputs were recorded"
OUTSIDE = "outside"


@dataclass(frozen=True)
class LayerQuality:
    """One layer: bytes with scales, rel-L2, cosine, SNR in dB (None: nothing lost), and whether
    calibration inputs were behind the figures.
    """

    name: str
    target: str
    bytes: int
    relative: float
    cosine: float
    snr_db: float | None
    calibrated: bool

    @property
    def block(self) -> str:
        """`blocks.3`, or `outside` for embeddings, projections and head."""
        found = BLOCK.match(self.name)
        return f"{found[1] or ''}blocks.{found[2]}" if found else OUTSIDE

    @property
    def group(self) -> str:
        """The name with the number of the block left out: `blocks.*.ffn.0`."""
        return re.sub(r"^((?:vace_)?blocks)\.\d+\.", r"\1.*.", self.name)


@dataclass(frozen=True)
class Summary:
    """Layers taken together: how many, their bytes, root mean square and largest rel-L2, and the
    layer that has it.
    """

    layers: int
    bytes: int
    relative: float
    worst: float
    worst_layer: str


@dataclass(frozen=True)
class QualityReport:
    """What one file lost against its source. bytes: the whole payload, layers and all else."""

    file: str
    source: str
    bytes: int
    layers: tuple[LayerQuality, ...]
    end_to_end: ModelError | None = None
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> Summary:
        """All layers of the report taken together."""
        return summary(self.layers)

    @property
    def blocks(self) -> dict[str, Summary]:
        """Block -> its layers taken together, in the order of the file."""
        return _summaries(self.layers, lambda layer: layer.block)

    @property
    def targets(self) -> dict[str, Summary]:
        """Format -> its layers taken together, in the order of the formats."""
        found = _summaries(self.layers, lambda layer: layer.target)
        return dict(sorted(found.items(), key=lambda item: _place(item[0])))

    @property
    def basis(self) -> str:
        """What the figures of the layers stand on, as a sentence."""
        seen = sum(layer.calibrated for layer in self.layers)
        if not seen:
            return ALONE
        rest = len(self.layers) - seen
        also = f", of {rest} the weights alone" if rest else ""
        return f"errors of the outputs of {seen} layers on calibration inputs{also}"

    def to_dict(self) -> dict[str, Any]:
        """Every number of the report, JSON-ready."""
        return asdict(self) | {
            "basis": self.basis,
            "whole": asdict(self.whole),
            "blocks": {name: asdict(part) for name, part in self.blocks.items()},
            "targets": {name: asdict(part) for name, part in self.targets.items()},
        }

    def text(self) -> str:
        """The same numbers as lines of text, layers grouped."""
        whole = self.whole
        lines = [
            f"{self.file}: {gigabytes(self.bytes)} ({self.bytes} bytes), against {self.source}",
            table(self.layers),
            f"layers: rel-L2 {whole.relative:.4f} (root mean square), worst "
            f"{whole.worst:.4f} in {whole.worst_layer}",
        ]
        if self.end_to_end is not None:
            lines.append(self.end_to_end.text())
        lines.append(self.basis)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def layer_quality(name: str, target: str, error: FormatError, calibrated: bool) -> LayerQuality:
    """The figures of one layer from its energies."""
    lost = error.snr_db
    return LayerQuality(
        name,
        target,
        error.bytes,
        error.relative,
        error.cosine,
        lost if math.isfinite(lost) else None,
        calibrated,
    )


def measured(
    name: str,
    target: str,
    weight: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    statistics: Statistics | None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The figures of one layer as it is written, JSON-ready: float weight [out, in], its stored
    tensors by suffix, the statistics of its inputs. `report_of` puts such figures together.
    """
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    options = formats.options(target, shape)
    error = stored_error(name, target, weight, tensors, options, statistics, device)
    return asdict(layer_quality(name, target, error, statistics is not None))


def report_of(
    file: str,
    source: str,
    size: int,
    layers: Iterable[Mapping[str, Any]],
    end: ModelError | None = None,
    notes: Sequence[str] = (),
) -> QualityReport:
    """A report from the figures that `measured` gave; size: bytes of the file's payload."""
    return QualityReport(
        file, source, size, tuple(LayerQuality(**row) for row in layers), end, tuple(notes)
    )


def chosen(curves: Mapping[str, LayerCurve], choice: Mapping[str, str]) -> list[LayerQuality]:
    """The figures of a choice before anything is written, from its curves."""
    return [
        layer_quality(name, target, curves[name].formats[target], curves[name].calibrated)
        for name, target in choice.items()
    ]


def plan_text(allocation: Allocation, curves: Mapping[str, LayerCurve], budget: int) -> str:
    """What a budget buys, before it is written: the table, the size to the byte, the error."""
    layers = chosen(curves, allocation.choice)
    rest = allocation.bytes - sum(layer.bytes for layer in layers)
    calibrated = any(layer.calibrated for layer in layers)
    lines = [
        table(layers),
        f"everything else, as it is: {gigabytes(rest)}",
        f"file: {gigabytes(allocation.bytes)} ({allocation.bytes} bytes) in a budget of "
        f"{gigabytes(budget)}",
        f"predicted relative error of the output: {math.sqrt(allocation.error):.4f} "
        "(errors of the layers by their share, taken as independent)",
        *(() if calibrated else (ALONE,)),
    ]
    return "\n".join(lines + [f"note: {note}" for note in allocation.notes])


def table(layers: Iterable[LayerQuality]) -> str:
    """Text: one line for each kind of layer and format, with number, bytes, root mean square and
    largest rel-L2.
    """
    rows = _summaries(layers, lambda layer: f"{layer.group}\0{layer.target}")
    cells = [("layers", "format", "number", "bytes", "rel-L2", "worst")]
    groups = list(dict.fromkeys(key.split("\0")[0] for key in rows))

    def order(key: str) -> tuple[int, int]:
        group, target = key.split("\0")
        return groups.index(group), _place(target)

    for key in sorted(rows, key=order):
        part, (group, target) = rows[key], key.split("\0")
        figures = (f"{part.relative:.4f}", f"{part.worst:.4f}")
        cells.append((group, target, str(part.layers), f"{part.bytes:,}", *figures))
    widths = [max(len(row[place]) for row in cells) for place in range(6)]
    lines = []
    for row in cells:
        left = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right))
    return "\n".join(lines)


def json_path(model: str | os.PathLike[str]) -> Path:
    """Where the report of a model file lies: beside it, as `<name>.quality.json`."""
    path = Path(model)
    return path.with_name(path.name.removesuffix(path.suffix) + SUFFIX)


def write_json(report: QualityReport, path: Path) -> Path:
    """Write the report, all of it or nothing; returns `path`, see `json_path`."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(
            json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="ascii"
        )
    return path


def read_json(path: str | os.PathLike[str]) -> QualityReport:
    """A report that `write_json` wrote. Raises FrugalError for anything else."""
    try:
        held = json_text.parse(Path(path).read_text(encoding="utf-8"))
        end = held["end_to_end"]
        return report_of(
            str(held["file"]),
            str(held["source"]),
            int(held["bytes"]),
            held["layers"],
            None if end is None else from_dict(end),
            held["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FrugalError(
            f"{Path(path).name} is no readable quality report",
            f"a file ending in {SUFFIX} as the converter writes it",
            "convert the model again",
        ) from error


def summary(layers: Iterable[LayerQuality]) -> Summary:
    """Layers taken together; of none: zeros."""
    held = tuple(layers)
    if not held:
        return Summary(0, 0, 0.0, 0.0, "")
    worst = max(held, key=lambda layer: layer.relative)
    mean = math.fsum(layer.relative**2 for layer in held) / len(held)
    size = sum(layer.bytes for layer in held)
    return Summary(len(held), size, math.sqrt(mean), worst.relative, worst.name)


def _summaries(layers: Iterable[LayerQuality], key) -> dict[str, Summary]:
    parts: dict[str, list[LayerQuality]] = {}
    for layer in layers:
        parts.setdefault(key(layer), []).append(layer)
    return {name: summary(part) for name, part in parts.items()}


def _place(target: str) -> int:
    return formats.TARGETS.index(target) if target in formats.TARGETS else len(formats.TARGETS)
