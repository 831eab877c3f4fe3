"""Files that appear under their name when they are whole, and not before."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A free name beside `path` to write to. When the block ends the file takes the name `path`,
    in place of what had it; when it fails, the unfinished file is removed and `path` stays.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
