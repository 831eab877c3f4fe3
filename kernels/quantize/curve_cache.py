"""Measured curves kept beside an unfinished conversion, so that an interrupted one measures on.

One JSON line for each layer, written as soon as it is measured. A line counts where its `of` equals
that of the current work; a torn last line and lines of other work are passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import json_text
from .curves import FormatError, LayerCurve

SUFFIX = ".part.curves"


class CurveFile:
    """The curves of one conversion. output: the file to be written. identity: JSON, equal for equal
    work.
    """

    def __init__(self, output: Path, identity: Any):
        self.path = output.with_name(output.name + SUFFIX)
        text = json.dumps(identity, sort_keys=True)
        self._mark = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.held: dict[str, LayerCurve] = {}
        whole = self.path.read_bytes() if self.path.exists() else b""
        for line in whole.splitlines():
            curve = _read(line, self._mark)
            if curve is not None:
                self.held[curve.name] = curve
        if not self.held:
            self.path.unlink(missing_ok=True)
        elif not whole.endswith(b"\n"):
            self._append("")

    def keep(self, curve: LayerCurve) -> None:
        """Add a curve; it is on disk when this returns."""
        self.held[curve.name] = curve
        self._append(json.dumps({"of": self._mark, **asdict(curve)}))

    def remove(self) -> None:
        """Delete the file, whose work is done."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(line: bytes, mark: str) -> LayerCurve | None:
    try:
        entry: Mapping[str, Any] = json_text.parse(line)
        if entry["of"] != mark:
            return None
        made = {target: FormatError(**error) for target, error in entry["formats"].items()}
        rows, width = entry["shape"]
        return LayerCurve(
            entry["name"],
            (rows, width),
            made,
            entry["refused"],
            entry["calibrated"],
            entry["white"],
        )
    except (ValueError, KeyError, TypeError):
        return None
