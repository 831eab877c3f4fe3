"""A safetensors file written in order, a group of tensors at a time, that survives interruption.

The header comes first, so every type and shape must be known before. Data go to `<name>.part`
beside the target, and a journal, `<name>.part.json`, says how many groups are safely in it: the
data reach the disk before the line that counts them. A later writer with the same header and
fingerprint goes on from there; with another it starts over. The target appears once, whole.

While a writer lives it holds a lock on the journal, which the system drops with the process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import json_text
from ..checkpoints.header import DTYPES, TensorInfo
from ..errors import FrugalError

CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
# Work that an interruption may cost: what was written since the last line of the journal.
COMMIT_BYTES = 1 << 28
COMMIT_SECONDS = 5.0
SLICE = 1 << 24
Group = Mapping[str, TensorInfo]


def arranged(groups: Iterable[Group]) -> list[Group]:
    """The groups in an order that aligns every tensor to its type: those whose bytes end at a
    multiple of 8 as they come, then the others, wide types first. Within a group the order stays.
    """
    even, odd = [], []
    for group in groups:
        size = sum(info.nbytes for info in group.values())
        (odd if size % ALIGNMENT else even).append(group)
    odd.sort(key=lambda group: -max(info.dtype.itemsize for info in group.values()))
    return even + odd


def header_bytes(groups: Iterable[Group], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a safetensors file that holds the groups in this order, padded with
    spaces to a multiple of 8 bytes. Raises FrugalError for a type that the format lacks and for a
    tensor that would not be aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for group in groups:
        for name, info in group.items():
            if info.dtype not in CODES or name in entries or position % info.dtype.itemsize:
                raise FrugalError(
                    f"{ascii(name)[1:-1][:80]} as {info.text()} at byte {position}",
                    "each tensor once, in a type of safetensors, aligned",
                    "report the file to ComfyUI-Frugal",
                )
            offsets = [position, position + info.nbytes]
            entries[name] = {
                "dtype": CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": offsets,
            }
            position = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class Writer:
    """Writes `groups` (name -> TensorInfo, dtype and shape) to `target` in their order.

    `fingerprint` stands for everything that decides the content; `resumed` tells how many groups an
    earlier run left, and `notes` what it noted of them. Used as a context manager, it leaves the
    unfinished file for a later run when the block ends early.

    Raises FrugalError if the target exists and `overwrite` is off, if another run writes it, and if
    the disk has less room than the rest of the file needs.
    """

    def __init__(
        self,
        target: Path,
        groups: Sequence[Group],
        metadata: Mapping[str, str],
        fingerprint: str,
        overwrite: bool = False,
    ):
        self.target, self.groups, self.overwrite = target, list(groups), overwrite
        self.part = target.with_name(f"{target.name}.part")
        self.journal = target.with_name(f"{target.name}.part.json")
        self.notes: dict[str, Any] = {}
        self.resumed = self.written = 0
        self._pending: dict[str, Any] = {}
        self._since, self._when = 0, time.monotonic()
        header = header_bytes(self.groups, metadata)
        payload = sum(info.nbytes for group in self.groups for info in group.values())
        self.size = len(header) + payload
        if not target.parent.is_dir():
            raise FrugalError(
                f"no folder {target.parent.name}",
                "a folder to write to",
                "make the folder, or write to another",
            )
        self._log = _locked(self.journal, target.name)
        self._file: Any = None
        try:
            self._refuse_existing()
            mark = hashlib.sha256(fingerprint.encode() + b"\0" + header).hexdigest()
            self._open(header, mark)
        except BaseException:
            if not self.part.exists():
                self.journal.unlink(missing_ok=True)
            self.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_existing(self) -> None:
        if self.overwrite or not self.target.exists():
            return
        raise FrugalError(
            f"{self.target.name} exists already",
            "a name that is free",
            "choose another name, or ask for it to be overwritten",
        )

    def _open(self, header: bytes, mark: str) -> None:
        self._log.seek(0)
        groups, position, notes, good = _progress(self._log.read(), mark, len(self.groups))
        kept = self.part.stat().st_size if self.part.exists() else 0
        if groups is None or position > kept:
            groups, position, notes, good = 0, 0, {}, 0
        self._check_room(self.size - position)
        if position:
            self._file = self.part.open("r+b", buffering=0)
            if self._file.read(len(header)) != header:
                position, groups, notes, good = 0, 0, {}, 0
        if not position:
            if self._file is not None:
                self._file.close()
            # The journal forgets the old data before they go.
            self._log.seek(0)
            self._log.truncate()
            _to_disk(self._log)
            self._file = self.part.open("wb", buffering=0)
            self._put(memoryview(header))
            _to_disk(self._file)
            position = len(header)
            self._append({"of": mark, "groups": 0, "bytes": position, "notes": {}})
            _folder_to_disk(self.part.parent)
        self._file.truncate(position)
        self._file.seek(position)
        if good:
            # A line that was cut off would spoil the one written after it.
            self._log.truncate(good)
        self._log.seek(0, os.SEEK_END)
        self._position = position
        self.resumed = self.written = groups
        self.notes = notes

    def _check_room(self, needed: int) -> None:
        used = self.part.stat().st_size if self.part.exists() else 0
        free = shutil.disk_usage(self.target.parent).free
        # What an unusable part holds is given back before its place is written.
        if needed > free + max(0, used - (self.size - needed)):
            raise FrugalError(
                f"{free} bytes are free in {self.target.parent.name}",
                f"{needed} bytes for {self.target.name}",
                "free some space, or write to another disk",
            )

    def write(
        self,
        tensors: Mapping[str, torch.Tensor],
        note: Mapping[str, Any] | None = None,
        step: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write the next group: every tensor of it, on the CPU, in the type and shape announced.

        `note` (JSON) is kept with the group and found in `notes` by a run that resumes; `step` is
        called with the bytes of each slice written. Raises FrugalError for other tensors and for a
        full disk; what was written before stays usable.
        """
        group = self.groups[self.written]
        for name, info in group.items():
            tensor = tensors[name]
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise FrugalError(
                    f"{name} came as {tensor.dtype} {list(tensor.shape)}",
                    info.text(),
                    "report the file to ComfyUI-Frugal",
                )
        if set(tensors) != set(group):
            raise FrugalError(
                f"{sorted(set(tensors) ^ set(group))[0]} beside {next(iter(group))}",
                f"the tensors {', '.join(group)}",
                "report the file to ComfyUI-Frugal",
            )
        for name in group:
            flat = tensors[name].detach().contiguous().reshape(-1)
            if flat.numel():
                self._put(flat.view(torch.uint8).numpy().data, step)
        self.written += 1
        size = sum(info.nbytes for info in group.values())
        self._position += size
        self._since += size
        if note:
            self._pending.update(note)
            self.notes.update(note)
        if self._since >= COMMIT_BYTES or time.monotonic() - self._when >= COMMIT_SECONDS:
            self.commit()

    def _put(self, data: memoryview, step: Callable[[int], None] = lambda done: None) -> None:
        for start in range(0, len(data), SLICE):
            piece = data[start : start + SLICE]
            done = 0
            with self._telling_of_the_disk():
                while done < len(piece):
                    done += self._file.write(piece[done:])
            step(len(piece))

    @contextlib.contextmanager
    def _telling_of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            do = "free some space" if full else "check that disk"
            raise FrugalError(
                f"{self.part} could not be written ({error.strerror or error})",
                f"{self.size} bytes for {self.target.name}",
                f"{do} and run again, what is done stays",
            ) from error

    def commit(self) -> None:
        """Bring what was written to the disk and note it in the journal."""
        with self._telling_of_the_disk():
            _to_disk(self._file)
            self._append({"groups": self.written, "bytes": self._position, "notes": self._pending})
        self._pending, self._since, self._when = {}, 0, time.monotonic()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(entry).encode("ascii") + b"\n")
        _to_disk(self._log)

    def finish(self) -> None:
        """Give the whole file its name. Raises FrugalError if groups are missing, or if the target
        appeared during the run and `overwrite` is off.
        """
        if self.written != len(self.groups) or self._position != self.size:
            raise FrugalError(
                f"{self.written} groups in {self.part.name}",
                f"{len(self.groups)}",
                "run the conversion again",
            )
        self._refuse_existing()
        self.commit()
        self._file.close()
        os.replace(self.part, self.target)
        _folder_to_disk(self.target.parent)
        # Windows does not delete an open file; there the lock is removed first.
        if os.name == "nt":
            self._log.close()
        self.journal.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the unfinished file for a later run and give the lock back."""
        if self._file is not None and not self._file.closed:
            if self.written > self.resumed or self._pending:
                with contextlib.suppress(FrugalError):
                    self.commit()
            self._file.close()
        if not self._log.closed:
            self._log.close()


def _progress(raw: bytes, mark: str, most: int) -> tuple[int | None, int, dict[str, Any], int]:
    """Groups and bytes that a journal vouches for, its notes, and how much of it is sound; None
    for the journal of other content.
    """
    groups, position, notes, good = None, 0, {}, 0
    for number, line in enumerate(raw.split(b"\n")[:-1]):
        try:
            entry = json_text.parse(line)
            if number == 0 and entry["of"] != mark:
                break
            found, end, own = int(entry["groups"]), int(entry["bytes"]), dict(entry["notes"])
        except (ValueError, KeyError, TypeError):
            break
        if found > most:
            break
        groups, position, good = found, end, good + len(line) + 1
        notes.update(own)
    return groups, position, notes, good


def _locked(path: Path, target: str) -> Any:
    """The file at `path`, made if need be, open for reading and writing and locked."""
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise FrugalError(
                f"{path.name} cannot be written ({error.strerror})", "a writable folder",
                "choose another folder",
            ) from error  # fmt: skip
        try:
            _lock(file)
            if os.name == "nt" or os.fstat(file.fileno()).st_nlink:
                return file
            # The writer before this one finished and took the file away: its lock is worthless.
            file.close()
        except OSError as error:
            file.close()
            busy = error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
            raise FrugalError(
                f"another run is writing {target}" if busy else f"{path.name} cannot be locked",
                "one run at a time" if busy else "a disk with file locks",
                "wait for it" if busy else "write to a local disk",
            ) from error


def _lock(file: Any) -> None:
    if os.name == "nt":
        msvcrt = importlib.import_module("msvcrt")
        # Far behind the end: Windows locks keep others from reading the locked bytes.
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _to_disk(file: Any) -> None:
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
