"""Disks that fill up: a limit on the size of files, and a small real file system."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: what would, fails with an OSError as on a
    full disk.
    """
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `folder`; skips where none may be mounted."""
    folder.mkdir(exist_ok=True)
    order = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(order, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder: Path) -> int:
    """Bytes that can still be written there."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def held_open(folder: Path) -> list[str]:
    """Files below `folder` that this process has open, deleted ones too; needs /proc."""
    found, place = [], Path("/proc/self/fd")
    for number in place.iterdir() if place.is_dir() else ():
        with contextlib.suppress(OSError):
            target = os.readlink(number)
            if target.startswith(f"{folder}/"):
                found.append(target)
    return found


def cuts(size: int, count: int) -> list[int]:
    """`count` sizes, evenly spread, at which a file of `size` bytes is cut off; 0 is the first."""
    return [size * number // count for number in range(count)]
