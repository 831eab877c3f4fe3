"""Where the tensors of one model are: a safetensors file, a set of shards with its index, or a
PyTorch file.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import json_text
from ..errors import FrugalError
from .gguf_file import SUFFIX, open_gguf
from .header import DOWNLOAD, Header, TensorInfo, read_header
from .packed import CONFIG, WORDS

INDEX_SUFFIX = ".safetensors.index.json"
SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
MAX_SMALL_BYTES = 65_536
MAX_INDEX_BYTES = 100_000_000
# Tensors of a PyTorch file may share numbers, and zipped weights shrink by a fifth; beyond these
# a small file is made to fill the memory.
MOST_REPEATED, MOST_GROWTH = 4, 20
# Files in which the writers of GPTQ and AWQ models leave their settings, the most specific first.
SETTINGS = ("quantize_config.json", "quant_config.json", "config.json")


@dataclass(frozen=True)
class Source:
    """One model on disk: its name, its files, every tensor's facts and the text metadata.

    `loaded` holds the memory-mapped tensors of a PyTorch file, or those of a GGUF file, made at
    each look-up; it is empty for safetensors, whose weights stay untouched until a loader maps
    them. `blocks` counts the bytes of a GGUF file per quantised type.
    """

    name: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    owner: Mapping[str, Path] = field(default_factory=dict)
    loaded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """File name -> bytes on disk."""
        return {path.name: path.stat().st_size for path in self.files}

    def value(self, name: str) -> torch.Tensor:
        """A small tensor (at most 64 KiB) by its name in the file, read now, in its stored
        dtype and shape.
        """
        if name in self.loaded:
            return self.loaded[name]
        info = self.tensors[name]
        if info.nbytes > MAX_SMALL_BYTES:
            raise FrugalError(
                f"{self.name} holds {name} as {info.text()}",
                f"at most {MAX_SMALL_BYTES} bytes for such a key",
                "choose a file in a known layout",
            )
        if not info.numel:
            return torch.empty(info.shape, dtype=info.dtype)
        with self.owner[name].open("rb") as file:
            file.seek(info.start)
            raw = bytearray(file.read(info.nbytes))
        return torch.frombuffer(raw, dtype=info.dtype).reshape(info.shape)


def open_source(
    path: str | os.PathLike[str], unpack_to: torch.dtype | None = torch.float16
) -> Source:
    """Open a model by file name: `.safetensors`, `.safetensors.index.json`, a PyTorch
    `.pt`/`.pth` file, or `.gguf`, whose quantised blocks are unpacked to the type `unpack_to`, or
    stay packed where that is None.

    Raises FrugalError for anything missing, damaged or of another kind.
    """
    path = Path(path)
    lower = path.name.lower()
    if path.is_dir():
        indexes = sorted(each.name for each in path.glob(f"*{INDEX_SUFFIX}"))
        files = sorted(
            each.name
            for each in path.iterdir()
            if each.name.lower().endswith((*SAFETENSORS, SUFFIX))
        )
        inside = indexes or (files if len(files) == 1 else [])
        raise FrugalError(
            f"{path.name} is a folder",
            "a model file, or the index of a model in parts",
            f"choose {inside[0]} in it" if inside else "choose the file in it",
        )
    if not path.is_file():
        raise FrugalError(
            f"{path.name} is not there",
            "a model file",
            "refresh the list of models and choose again",
        )
    if lower.endswith(INDEX_SUFFIX):
        return _with_settings(_open_shards(path))
    if lower.endswith(SAFETENSORS):
        header = read_header(path)
        _refuse_lone_part(path, header)
        owner = dict.fromkeys(header.tensors, path)
        return _with_settings(Source(path.name, (path,), header.tensors, header.metadata, owner))
    if lower.endswith(PICKLES):
        return _open_pickle(path)
    if lower.endswith(SUFFIX):
        tensors, unpacked, blocks = open_gguf(path, unpack_to)
        return Source(path.name, (path,), tensors, {}, loaded=unpacked, blocks=blocks)
    raise FrugalError(
        f"{path.name} is of an unknown kind",
        f"a file ending in {', '.join((*SAFETENSORS, *PICKLES, SUFFIX))}",
        "choose another file",
    )


def _with_settings(source: Source) -> Source:
    """The source with the quantisation settings beside it among its metadata, where its tensors
    are GPTQ or AWQ and the folder holds no other model that the settings could belong to.
    """
    folder = source.files[0].parent
    packed = any(name.endswith(f".{WORDS}") for name in source.tensors)
    if not packed or CONFIG in source.metadata:
        return source
    others = [path for path in folder.iterdir() if path.name.lower().endswith(SAFETENSORS)]
    if {path.name for path in others} != {path.name for path in source.files}:
        return source
    for name in SETTINGS:
        path = folder / name
        if not path.is_file() or path.stat().st_size > MAX_INDEX_BYTES:
            continue
        try:
            content = json_text.parse(path.read_text("utf-8"))
            found = content if name != "config.json" else content.get(CONFIG)
        except (OSError, ValueError, AttributeError) as error:
            raise FrugalError(
                f"{name} beside {source.name} is no readable settings file",
                "JSON with settings of GPTQ or AWQ",
                DOWNLOAD,
            ) from error
        if found is not None:
            return replace(source, metadata={**source.metadata, CONFIG: json.dumps(found)})
    return source


def parts_of(index: Path) -> tuple[Path, ...]:
    """The files that an index lists. Raises FrugalError for one that cannot be read."""
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def index_of(path: Path) -> Path | None:
    """The index beside a safetensors file that lists it as one of several parts, if there is one
    that can be read.
    """
    for index in sorted(path.parent.glob(f"*{INDEX_SUFFIX}")):
        try:
            parts = parts_of(index)
        except FrugalError:
            continue
        if len(parts) > 1 and path in parts:
            return index
    return None


def _refuse_lone_part(path: Path, header: Header) -> None:
    shard, index = SHARD.search(path.name), index_of(path)
    if index is None and not (shard and int(shard.group(2)) > 1):
        return
    which = f"part {int(shard.group(1))} of {int(shard.group(2))}" if shard else "one of the parts"
    raise FrugalError(
        f"{path.name} is {which} with {len(header.tensors)} tensors",
        "a whole model",
        f"choose the entry {'ending in ' + INDEX_SUFFIX if index is None else index.name}, which "
        "loads all parts",
    )


def _open_shards(index: Path) -> Source:
    weight_map = _weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    owner: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    files = parts_of(index)
    for path in files:
        if not path.is_file():
            raise FrugalError(
                f"{index.name} names the part {path.name}, which is not there",
                f"all {len(files)} parts in the folder of the index",
                "download the missing part",
            )
        header = read_header(path)
        for name, info in header.tensors.items():
            if weight_map.get(name) != path.name:
                raise FrugalError(
                    f"{path.name} holds the tensor {name}, which {index.name} places in "
                    f"{weight_map.get(name, 'no part')}",
                    "parts that agree with their index",
                    "download index and parts of one release",
                )
            tensors[name], owner[name] = info, path
        for key, value in header.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise FrugalError(
                    f"{path.name} says {key} differently from the parts before it",
                    "the same metadata in all parts",
                    "download all parts of one release",
                )
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise FrugalError(
            f"{len(absent)} tensors named in {index.name} are in no part, first {absent[0]}",
            "parts that agree with their index",
            "download index and parts of one release",
        )
    return Source(index.name, files, tensors, metadata, owner)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        weight_map = json_text.parse(index.read_text("utf-8"))["weight_map"]
        entries = dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FrugalError(
            f"{index.name} is no readable index", "JSON with a weight_map", DOWNLOAD
        ) from error
    for name, part in entries.items():
        plain = isinstance(part, str) and part == os.path.basename(part) and "\\" not in part
        if not plain or not part.lower().endswith(SAFETENSORS):
            raise FrugalError(
                f"{index.name} places {name} in {ascii(part)[:80]}",
                "the plain name of a safetensors file beside the index",
                "download the index again",
            )
    if not entries:
        raise FrugalError(f"{index.name} lists no tensor", "at least one", DOWNLOAD)
    return entries


def check_file(path: Path) -> None:
    """Before ComfyUI's own reader, which has no sentence for a safetensors file that was cut or is
    a web page, and maps PyTorch files that cannot be: raises FrugalError for these.
    """
    if path.name.lower().endswith(SAFETENSORS):
        read_header(path)
    elif path.suffix.lower() in PICKLES and _is_compressed(path):
        raise FrugalError(
            f"{path.name} is a PyTorch file that was zipped again, with compression",
            "a file as torch.save writes it",
            "use a safetensors copy, or load the file with torch.load and save it with torch.save",
        )


def _is_compressed(path: Path) -> bool:
    """Whether a PyTorch file was zipped again, with compression: mapped into memory, its compressed
    bytes would be taken for weights. A damaged archive is left to the reader.
    """
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in _entries(path))


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """Of a PyTorch file that is an archive; none of one that is not, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:  # the standard library raises what the damaged bytes happen to mean
        return []


def _open_pickle(path: Path) -> Source:
    mapped = not _is_compressed(path)
    size = _unpacked_size(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FrugalError(
            f"{path.name} cannot be read as plain weights ({ascii(first)[1:-1][:160]})",
            "a PyTorch file (torch 1.6 or newer) that holds tensors only",
            "use a safetensors copy of the model, or convert the file in a place you trust",
        ) from error
    loaded: dict[str, torch.Tensor] = {}
    _flatten(content, "", loaded, 0)
    if not loaded:
        raise FrugalError(f"{path.name} holds no tensor", "a state dict", "choose another file")
    tensors = {
        name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()
    }
    claimed = sum(info.nbytes for info in tensors.values())
    if claimed > MOST_REPEATED * size:
        raise FrugalError(
            f"{path.name} has {size} bytes and tensors of {claimed}, the same numbers again and "
            "again",
            "tensors with numbers of their own",
            "use a safetensors copy of the model",
        )
    return Source(path.name, (path,), tensors, {}, loaded=loaded)


def _unpacked_size(path: Path) -> int:
    """Bytes of a PyTorch file without compression. Raises FrugalError for an archive that grows
    far beyond what compressed weights do.
    """
    packed = path.stat().st_size
    size = sum(entry.file_size for entry in _entries(path))
    if size > MOST_GROWTH * packed:
        raise FrugalError(
            f"{path.name} grows from {packed} to {size} bytes",
            f"at most {MOST_GROWTH} times its size",
            "use a safetensors copy of the model",
        )
    return max(size, packed)


def _flatten(content: Any, prefix: str, into: dict[str, torch.Tensor], depth: int) -> None:
    """Nested dicts such as {'generator_ema': {...}} become dotted names; what is no tensor is
    left behind.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            into[name] = value
        elif isinstance(value, Mapping):
            nested = "" if key == "state_dict" else f"{name}."
            _flatten(value, nested, into, depth + 1)
