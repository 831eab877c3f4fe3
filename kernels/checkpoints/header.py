"""Reads and checks the header of a safetensors file before any weight is touched.

The checks follow the safetensors format description: 8 bytes little-endian header length, JSON
header, then the tensor bytes, which must tile the rest of the file without holes or overlap. The
libraries that read the weights check less, or fail with an exception that names no remedy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FrugalError
from ..formats.gguf_blocks import TYPES

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
MAX_TENSORS = 200_000
DOWNLOAD = "download or copy the file again and compare its size with the source"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `start` and `end` are byte positions in the file (0
    when not in a file). `blocks` names the type of GGUF blocks (one of gguf_blocks.TYPES) that
    stand for the values of `shape`; their dtype is uint8.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0
    blocks: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if self.blocks:
            return self.numel // TYPES[self.blocks].values * TYPES[self.blocks].size
        return self.numel * self.dtype.itemsize

    def text(self) -> str:
        name = f"GGUF {self.blocks}" if self.blocks else str(self.dtype).removeprefix("torch.")
        return f"{name} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """A checked header: tensor name -> TensorInfo, string metadata, size of the file in bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the safetensors file `path`; reads nothing behind the header.

    Raises FrugalError for a missing, empty, truncated, overlong or malformed file.
    """
    path = Path(path)
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            _check_length(path, head, length, file_size)
            raw = file.read(length)
    except OSError as error:
        raise FrugalError(
            f"{path.name} cannot be read ({error.strerror or error})",
            "a readable safetensors file",
            "check that the file still exists and that its permissions allow reading",
        ) from error
    if len(raw) != length:
        raise FrugalError(
            f"{path.name} ends inside its header", f"{length} bytes of header", DOWNLOAD
        )
    content = _parse(path, raw)
    metadata = _metadata(path, content.pop("__metadata__", {}))
    if len(content) > MAX_TENSORS:
        raise FrugalError(
            f"{path.name} lists {len(content)} tensors",
            f"at most {MAX_TENSORS}",
            "choose a model file",
        )
    base = 8 + length
    tensors = {name: _tensor(path, name, entry, base) for name, entry in content.items()}
    _check_tiling(path, tensors, base, file_size)
    return Header(path, tensors, metadata, file_size)


def _check_length(path: Path, head: bytes, length: int, file_size: int) -> None:
    if file_size == 0:
        raise FrugalError(f"{path.name} is empty (0 bytes)", "a safetensors file", DOWNLOAD)
    if len(head) == 8 and 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        return
    # Only now: the first bytes of a good file may look like those of another kind.
    if head[:4] == b"GGUF":
        raise FrugalError(
            f"{path.name} is a GGUF file under another name",
            "a safetensors file",
            "rename the file to .gguf",
        )
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        raise FrugalError(
            f"{path.name} is a PyTorch pickle file under another name",
            "a safetensors file",
            "rename the file to .pt",
        )
    if head[:1] in (b"<", b"{") or head.startswith(b"version "):
        raise FrugalError(
            f"{path.name} is a text file of {file_size} bytes, such as a web page or a "
            "Git LFS pointer",
            "a safetensors file",
            "download the real file",
        )
    if len(head) < 8 or 8 + length > file_size:
        raise FrugalError(
            f"{path.name} has {file_size} bytes and announces a header of {length} bytes",
            "a header that fits in the file",
            DOWNLOAD,
        )
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FrugalError(
            f"{path.name} announces a header of {length} bytes",
            f"2 to {MAX_HEADER_BYTES} bytes",
            DOWNLOAD,
        )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} occurs twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"the value {constant} is no JSON")

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = (
            "nesting too deep"
            if isinstance(error, RecursionError)
            else ascii(str(error))[1:-1][:120]
        )
        raise FrugalError(
            f"{path.name} has a damaged header ({reason})", "a JSON header", DOWNLOAD
        ) from error
    if not isinstance(content, dict):
        raise FrugalError(
            f"{path.name} has a header that is a {type(content).__name__}",
            "a JSON object",
            DOWNLOAD,
        )
    return content


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise FrugalError(
            f"{path.name} has metadata that are not text", "metadata of names and strings", DOWNLOAD
        )
    return entry


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    label = ascii(name)[1:-1][:120]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FrugalError(
            f"{path.name} describes the tensor {label} wrongly",
            "dtype, shape and data_offsets",
            DOWNLOAD,
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise FrugalError(
            f"{path.name} stores the tensor {label} as {ascii(code)[:40]}",
            f"one of {', '.join(DTYPES)}",
            "choose a file in a common type such as fp16, bf16 or fp8",
        )
    if not _natural_numbers(shape) or len(shape) > MAX_RANK:
        raise FrugalError(
            f"{path.name} gives the tensor {label} the shape {ascii(shape)[:60]}",
            f"at most {MAX_RANK} numbers >= 0",
            DOWNLOAD,
        )
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise FrugalError(
            f"{path.name} gives the tensor {label} the offsets {ascii(offsets)[:60]}",
            "two numbers 0 <= start <= end",
            DOWNLOAD,
        )
    info = TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])
    if info.nbytes != offsets[1] - offsets[0]:
        raise FrugalError(
            f"{path.name} gives the tensor {label} {offsets[1] - offsets[0]} bytes",
            f"{info.nbytes} bytes for {info.text()}",
            DOWNLOAD,
        )
    return info


def _natural_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 2**48 for number in value
    )


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], base: int, file_size: int) -> None:
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            label = ascii(name)[1:-1][:120]
            raise FrugalError(
                f"{path.name} stores the tensor {label} at byte {info.start}",
                f"byte {position}, where the tensor before it ends",
                DOWNLOAD,
            )
        position = info.end
    if position != file_size:
        raise FrugalError(
            f"{path.name} has {file_size} bytes", f"{position} bytes by its header", DOWNLOAD
        )
