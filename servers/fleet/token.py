"""Secrets: from the environment by name, else made once and kept in a file only its owner reads."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ...kernels.errors import FrugalError

SHORTEST = 16


def from_environment(variable: str) -> str:
    """Raises FrugalError where the variable holds no usable token."""
    token = os.environ.get(variable, "")
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise FrugalError(
            f"no usable token in the environment variable {ascii(variable)[1:-1]}",
            f"at least {SHORTEST} ASCII characters without spaces",
            f"set it, or leave {ascii(variable)[1:-1]} out and one is made",
        )
    return token


def kept(path: Path) -> str:
    """The token in `path`, which is made if absent. Raises FrugalError where others may read it."""
    try:
        # Created closed: between a write and a chmod others could look.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if os.name != "nt" and path.stat().st_mode & 0o077:
            raise FrugalError(
                f"{path} can be read by others", "a file of its owner alone", f"chmod 600 {path}"
            ) from None
        token = path.read_text("utf-8").strip()
        if len(token) < SHORTEST:
            raise FrugalError(
                f"{path} holds no token", "the one that was made", "delete the file"
            ) from None
        return token
    token = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(token)
    return token
