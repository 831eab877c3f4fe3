"""Files that appear under their name when they are whole, and not before."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FrugalError

UNFINISHED = ".part"
# Seconds after which an unfinished file belongs to no run any more.
LEFT_OVER = 24 * 3600
_OURS = re.compile(r"\.\d+\.[0-9a-f]{8}\.part")

_REMEDIES = {
    errno.ENOSPC: "free disk space, or choose another folder",
    errno.EDQUOT: "free disk space, or choose another folder",
    errno.EFBIG: "choose a folder on a disk that takes files of this size",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "close whatever has the file open, or choose a folder that can be written",
    errno.EPERM: "close whatever has the file open, or choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check that disk, or choose another folder",
    errno.ENXIO: "connect that disk again, or choose another folder",
    errno.ENODEV: "connect that disk again, or choose another folder",
    errno.ENOENT: "connect that disk again, or choose another folder",
    errno.EBADF: "connect that disk again, or choose another folder",
}


class WriteError(FrugalError, OSError):
    """A file could not be written; nothing stands under its name but what was there before.

    An OSError too, with its `errno`, for callers to whom a file is no more than a help.
    """

    def __init__(self, path: Path, error: OSError):
        do = _REMEDIES[error.errno or errno.EIO]
        reason = error.strerror or str(error)
        super().__init__(f"{path} could not be written ({reason}{_free(path)})", "room for it", do)
        self.errno, self.strerror = error.errno, reason

    def __str__(self) -> str:
        return self.args[0]


def write_error(path: Path, error: OSError) -> OSError:
    """What to raise in place of `error`, which came up while `path` was written: a WriteError where
    the disk or the name is to blame, else `error` itself.
    """
    if isinstance(error, WriteError) or (error.errno or 0) not in _REMEDIES:
        return error
    return WriteError(path, error)


def _free(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f", {shutil.disk_usage(path.parent).free / 1e6:.0f} MB free"
    return ""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A free name to write to, on the disk of `path`. When the block ends the file takes the name
    `path`, in place of what had it; when it fails, the unfinished file is removed and `path` stays.

    Raises WriteError where the disk or the name is to blame, and what the block raises otherwise.
    """
    _sweep_once(path.parent)
    # A folder, because some writers put a temporary file of their own beside the one that they are
    # given; a short name, because one of 255 bytes is allowed for `path`.
    private = path.with_name(f".{os.getpid()}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
    unfinished = private / "unfinished"
    try:
        private.mkdir()
        yield unfinished
        _to_disk(unfinished)
        # Some writers keep what they write to themselves; the folder has the user's usual rights.
        unfinished.chmod(private.stat().st_mode & 0o666)
        os.replace(unfinished, path)
    except OSError as error:
        told = write_error(path, error)
        raise told from (None if told is error else error)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Without this a rename can reach the disk before the content does, and a power cut leaves an
    empty file under the name.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@functools.cache
def _sweep_once(folder: Path) -> None:
    """Remove what killed runs left in `folder`."""
    for left in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if _OURS.fullmatch(left.name) and time.time() - left.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(left)
