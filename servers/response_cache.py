"""Answers that were paid for once, as small JSON files; and how often a question failed.

The count of failures is what a caller may use as a sign to ask again: it changes with each failure
and not with a success.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..kernels import json_text
from ..kernels.atomic_write import atomic_write

LARGEST = 10**6


def key(*parts: Any) -> str:
    """A file name for what `parts` say; they are JSON or bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """What was kept under `name`; None if nothing was, or what lies there cannot be read."""
    path = folder / f"{name}.json"
    try:
        if path.stat().st_size > LARGEST:
            return None
        found = json_text.parse(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Keep `value` under `name`: written beside, then renamed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{name}.json") as unfinished:
        unfinished.write_text(json.dumps(value), encoding="utf-8")


def failures(folder: Path, name: str) -> int:
    """How often `failed` was called for `name`."""
    count = (read(folder, name) or {}).get("failures", 0)
    return count if isinstance(count, int) else 0


def failed(folder: Path, name: str) -> None:
    """Count one failure. Raises OSError."""
    write(folder, name, {"failures": failures(folder, name) + 1})
