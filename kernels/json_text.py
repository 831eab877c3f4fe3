"""JSON from files and servers that may be damaged or hostile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import FrugalError

# Far beyond any graph or answer, and far below what Python's own recursion allows.
DEEPEST = 100
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


def parse(text: bytes | str, constants: bool = True) -> Any:
    """The value of a JSON text. constants: whether NaN and Infinity, which JSON has not, are read.

    Raises ValueError for whatever is wrong with it, text nested so deep that Python gives up
    included, at once or when the value is written again.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}")
    return json.loads(text, parse_constant=None if constants else _refuse)


def _depth(text: str) -> int:
    now = most = 0
    for token in _TOKEN.finditer(text):
        now += bool(token[1]) - bool(token[2])
        most = max(most, now)
    return most


def _refuse(name: str) -> Any:
    raise ValueError(name)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a settings file. Raises FrugalError if there is none."""
    try:
        found = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = ascii(str(error))[1:-1][:120]
        raise FrugalError(
            f"{path.parent.name}/{path.name} cannot be read ({reason})",
            "a JSON file",
            "copy it from the model's page again",
        ) from error
    if not isinstance(found, dict):
        raise FrugalError(
            f"{path.parent.name}/{path.name} holds a {type(found).__name__}",
            "a JSON object",
            "copy it from the model's page again",
        )
    return found
