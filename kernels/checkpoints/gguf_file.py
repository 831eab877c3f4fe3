"""GGUF files as a source of tensors, through the library `gguf` where it is installed.

The library checks little: a damaged array length makes it loop, a damaged offset gives other bytes.
So the header is walked first, and the tensors must tile the file. Layout: the GGUF description of
the ggml project (magic, version, counts, typed key-value pairs, tensor list, aligned data).

Quantised blocks of a matrix are handed on as they are, mapped, where gguf_blocks.py knows their
type. All others, and every one where a type is asked for, are unpacked with the library's own
formulas to float32, then rounded once, one tensor at a time as it is looked up.
"""

from __future__ import annotations

import importlib
import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FrugalError
from ..formats.gguf_blocks import TYPES
from .header import DOWNLOAD, MAX_TENSORS, TensorInfo

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_FIELDS = 10_000
# Of all arrays together: a tokenizer of 256,000 words has three. The library makes an object of
# each entry.
MAX_ITEMS = 1_500_000
# ggml itself holds four; ComfyUI-GGUF's tools put Wan's patch_embedding.weight in with its five.
MAX_RANK = 5
# Bytes of the scalar types of a key-value pair, by the number that names the type.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What blocks are unpacked to that cannot stay packed.
UNPACKED = torch.float16
# Left by converters for tensors that they store in another shape.
SHAPE_KEY = "comfy.gguf.orig_shape."
# The one tensor of a Wan model with more than four dimensions, and the last three of them.
PATCHES, PATCH = "patch_embedding", (1, 2, 2)


class Unpacked(Mapping[str, torch.Tensor]):
    """Tensor name -> tensor, made at each look-up; floats and packed blocks stay mapped."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]):
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def open_gguf(
    path: Path, dtype: torch.dtype | None
) -> tuple[dict[str, TensorInfo], Unpacked, dict[str, int]]:
    """Facts and tensors of a GGUF file, quantised ones unpacked to `dtype`, or packed where that is
    None: uint8 [rows, bytes of a row]; and per quantised type its bytes in the file. Shapes are
    those of the values, in torch's order.

    Raises FrugalError if the file is damaged, holds a type that the library cannot unpack, or the
    library is not installed.
    """
    check_header(path)
    try:
        gguf = importlib.import_module("gguf")
        unpack = importlib.import_module("gguf.quants").dequantize
    except ImportError as error:
        raise FrugalError(
            f"{path.name} is a GGUF file, and the Python package gguf is not installed here",
            "the package that reads such files",
            "install it into ComfyUI's Python with 'pip install gguf' and restart, or use an fp8 "
            "or int8 file of the same model",
        ) from error
    try:
        # Copy on write: torch refuses to see read-only memory without a warning.
        reader = gguf.GGUFReader(path, "c")
        shapes = {tensor.name: _shape(path, reader, tensor) for tensor in reader.tensors}
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        reason = ascii(str(error))[1:-1][:120]
        raise FrugalError(
            f"{path.name} is a damaged GGUF file ({reason})", "a readable header", DOWNLOAD
        ) from error
    _check_tiling(path, reader)
    _restore_patches(path, shapes)
    infos: dict[str, TensorInfo] = {}
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, shapes[tensor.name]
        if dtype is None and _stays_packed(kind, shape):
            infos[tensor.name] = TensorInfo(torch.uint8, shape, blocks=kind)
            makers[tensor.name] = _packed(tensor, shape[0])
        else:
            held = FLOATS.get(kind, dtype or UNPACKED)
            infos[tensor.name] = TensorInfo(held, shape)
            makers[tensor.name] = _maker(path, tensor, shape, held, unpack)
        if kind not in FLOATS:
            sizes[kind] += int(tensor.n_bytes)
    return infos, Unpacked(makers), dict(sizes)


def _stays_packed(kind: str, shape: tuple[int, ...]) -> bool:
    return kind in TYPES and len(shape) == 2 and not shape[1] % TYPES[kind].values


def _packed(tensor: Any, rows: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.from_numpy(tensor.data).reshape(rows, -1)


def _maker(
    path: Path, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, unpack: Callable[..., Any]
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        if tensor.tensor_type.name in ("F32", "F16"):
            return torch.from_numpy(tensor.data).reshape(shape)
        if tensor.tensor_type.name == "BF16":
            return torch.from_numpy(tensor.data).view(torch.bfloat16).reshape(shape)
        try:
            numbers = unpack(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise FrugalError(
                f"{path.name} stores {ascii(tensor.name)[1:-1][:80]} as {tensor.tensor_type.name}, "
                "which the package gguf cannot unpack",
                "a type that it knows",
                "update the package gguf, or use another file of the same model",
            ) from error
        whole = torch.from_numpy(numbers).reshape(shape)
        value = whole.to(dtype)
        if not bool(torch.isfinite(value).all()):
            raise FrugalError(
                f"{path.name}: {ascii(tensor.name)[1:-1][:80]} holds values beyond "
                f"{str(dtype).removeprefix('torch.')}",
                "finite weights",
                "set weight_dtype to bf16, or download the file again",
            )
        return value

    return make


def _shape(path: Path, reader: Any, tensor: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    field = reader.get_field(f"{SHAPE_KEY}{tensor.name}")
    if field is None:
        return shape
    original = tuple(int(field.parts[place][0]) for place in field.data)
    if math.prod(original) != math.prod(shape):
        raise FrugalError(
            f"{path.name} gives {ascii(tensor.name)[1:-1][:80]} the shapes {list(original)} and "
            f"{list(shape)}",
            "one size",
            DOWNLOAD,
        )
    return original


def _restore_patches(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give every patch embedding its five dimensions where a writer joined some: the order of the
    numbers is the same. Raises FrugalError where the weight is still in a file of its own.
    """
    for bias in [name for name in shapes if name.endswith(f"{PATCHES}.bias")]:
        name = f"{bias.removesuffix('bias')}weight"
        if name not in shapes:
            raise FrugalError(
                f"{path.name} is an unfinished conversion: it holds {ascii(bias)[1:-1][:80]} and "
                f"no {PATCHES}.weight",
                "a finished file",
                "run fix_5d_tensors.py of ComfyUI-GGUF's tools on it, or download a finished file",
            )
        rows, count = math.prod(shapes[bias]), math.prod(shapes[name])
        if len(shapes[name]) != 2 + len(PATCH) and rows and not count % (rows * math.prod(PATCH)):
            shapes[name] = (rows, count // rows // math.prod(PATCH), *PATCH)


def _check_tiling(path: Path, reader: Any) -> None:
    align, position = int(reader.alignment), int(reader.data_offset)
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        if start != position:
            raise FrugalError(
                f"{path.name} stores {ascii(tensor.name)[1:-1][:80]} at byte {start}",
                f"byte {position}, after the tensor before it",
                DOWNLOAD,
            )
        end = start + int(tensor.n_bytes)
        position = (end + align - 1) // align * align
        if tensor.data.nbytes != tensor.n_bytes or end > path.stat().st_size:
            raise FrugalError(
                f"{path.name} has {path.stat().st_size} bytes", f"at least {end}", DOWNLOAD
            )
    if path.stat().st_size > position:
        raise FrugalError(
            f"{path.name} has {path.stat().st_size} bytes", f"at most {position}", DOWNLOAD
        )


def check_header(path: Path) -> None:
    """Walk the header of a GGUF file: every length must fit in the file. Raises FrugalError."""
    size = path.stat().st_size
    if size < 24:
        raise FrugalError(f"{path.name} has {size} bytes", "a GGUF file", DOWNLOAD)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise FrugalError(
                f"{path.name} begins with {ascii(bytes(data[:4]))[2:-1]}", "GGUF", DOWNLOAD
            )
        version, tensors, fields = struct.unpack_from("<IQQ", data, 4)
        if version not in VERSIONS or tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise FrugalError(
                f"{path.name} has version {version}, {tensors} tensors, {fields} entries",
                f"version 2 or 3, at most {MAX_TENSORS} and {MAX_FIELDS}",
                DOWNLOAD,
            )
        try:
            position, items = 24, 0
            for _ in range(fields):
                position = _after_string(data, position)
                (kind,) = struct.unpack_from("<I", data, position)
                position += 4
                if kind == ARRAY:
                    items += struct.unpack_from("<IQ", data, position)[1]
                    if items > MAX_ITEMS:
                        raise ValueError(f"arrays of {items} entries")
                position = _after_value(data, position, kind)
            for _ in range(tensors):
                position = _after_string(data, position)
                (rank,) = struct.unpack_from("<I", data, position)
                if rank > MAX_RANK:
                    raise ValueError(f"a tensor of {rank} dimensions")
                position = _inside(data, position + 4 + 8 * rank + 12)
        except (struct.error, ValueError) as error:
            reason = ascii(str(error))[1:-1][:120]
            raise FrugalError(
                f"{path.name} is a damaged GGUF file ({reason})", "a header that fits", DOWNLOAD
            ) from error


def _inside(data: mmap.mmap, position: int) -> int:
    if position > len(data):
        raise ValueError(f"an entry ends at byte {position} of {len(data)}")
    return position


def _after_string(data: mmap.mmap, position: int) -> int:
    (length,) = struct.unpack_from("<Q", data, position)
    return _inside(data, position + 8 + length)


def _after_value(data: mmap.mmap, position: int, kind: int) -> int:
    if kind == STRING:
        return _after_string(data, position)
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", data, position)
        if inner == ARRAY:
            raise ValueError("an array of arrays")
        position += 12
        if inner == STRING:
            for _ in range(count):
                position = _after_string(data, position)
            return position
        return _inside(data, position + count * _scalar_size(inner))
    return _inside(data, position + _scalar_size(kind))


def _scalar_size(kind: int) -> int:
    if kind not in SCALARS:
        raise ValueError(f"a value of type {kind}")
    return SCALARS[kind]
