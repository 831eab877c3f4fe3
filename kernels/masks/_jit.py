"""The pack's `njit` and `njit_no_refcount`: nogil, and a compile cache that survives a move.

Numba keys its cache files by module name. Under ComfyUI that name is the full path of the pack, so
a moved folder, or a second name for the same checkout, would load code that asks for a module that
is gone. The cache folder is therefore named by the module name and by the kernel sources: Numba
looks at the time stamp of one file only, and would keep code compiled from an older version of a
function imported from another file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..log import LOG

CACHE_VARIABLE = "FRUGAL_CACHE_DIR"
_decorating = threading.Lock()


def cache_root() -> Path:
    """Folder of the user's compile caches; FRUGAL_CACHE_DIR in the environment replaces it."""
    if chosen := os.environ.get(CACHE_VARIABLE) or os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "comfyui-frugal" / "numba"


@functools.cache
def _source_digest(folder: str) -> bytes:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(Path(folder).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


@functools.cache
def cache_folder(module: str, source: str) -> str | None:
    """A writable folder for the kernels of `module` (defined in file `source`), or None if there
    is none.
    """
    try:
        key = hashlib.sha1(module.encode(), usedforsecurity=False)
        key.update(_source_digest(os.path.dirname(source)))
        folder = cache_root() / key.hexdigest()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None


def njit(function: Callable[..., Any]) -> Any:
    """Compile `function` lazily with Numba: no GIL held, no parallel layer, NumPy error model.

    `parallel=True` is never used: two Python threads inside Numba's workqueue layer abort the
    process, and the pack shares that process with others. Raises ImportError (or SystemError, from
    an old Numba on a new NumPy) when Numba cannot be used; `dispatch` then takes the reference.
    """
    return _compiled(function, {})


def njit_no_refcount(function: Callable[..., Any]) -> Any:
    """`njit` for a function that makes no array of its own, which is compiled without reference
    counts.

    Every row that a loop takes from an array is otherwise counted up and down with atomic
    instructions, which cost more than the SIMD loop over a short row. Numba has no public name for
    the switch; where it is missing the function is compiled with counts.
    """
    try:
        return _compiled(function, {"_nrt": False})
    except KeyError:
        return njit(function)


class _RecoveringCache:
    """Numba's cache of one function, whose damaged or full files cost a compilation and no more.

    Numba reads its cache at every new signature; a file that a full disk or a power cut left half
    written raises there, and would again at every call.
    """

    def __init__(self, cache: Any):
        self._held = cache

    def load_overload(self, *given: Any) -> Any:
        try:
            return self._held.load_overload(*given)
        except Exception as error:
            LOG.warning(
                "[Frugal] masks: a compiled kernel on disk is damaged (%r); made anew", error
            )
            with contextlib.suppress(OSError):
                self._held.flush()
            return None

    def save_overload(self, *given: Any) -> None:
        try:
            self._held.save_overload(*given)
        except Exception as error:
            LOG.warning("[Frugal] masks: a compiled kernel was not kept on disk: %r", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


def _compiled(function: Callable[..., Any], more: dict[str, Any]) -> Any:
    import numba.core.config

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | more
    folder = cache_folder(function.__module__, function.__code__.co_filename)
    if folder is None:
        return numba.njit(**options)(function)
    with _decorating:
        config: Any = numba.core.config
        before = config.CACHE_DIR
        config.CACHE_DIR = folder
        try:
            compiled: Any = numba.njit(cache=True, **options)(function)
            # No public name, so where a newer Numba has another the cache is as it comes.
            if hasattr(compiled, "_cache"):
                compiled._cache = _RecoveringCache(compiled._cache)
            return compiled
        except (RuntimeError, OSError):
            return numba.njit(**options)(function)
        finally:
            config.CACHE_DIR = before
