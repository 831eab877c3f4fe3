"""Text conditioning on disk: a list of (embedding, extras) as one safetensors file, bit for bit.

Tensors are named `<index>.embedding` and `<index>.<key>`; numbers, text, booleans and None go as
JSON into the metadata entry `frugal_text_embeds`. Floats survive because JSON text of a float is
exact in Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .. import json_text
from ..errors import FrugalError
from ..tensor_file import write_tensors
from .header import read_header

MARK = "frugal_text_embeds"
VERSION = 1
EMBEDDING = "embedding"

Conditioning = Sequence[tuple[torch.Tensor, dict[str, Any]]]


def write_text_embeds(conditioning: Conditioning, path: Path) -> None:
    """Write `conditioning`, a list of (tensor [batch, tokens, width], dict), to `path`, which
    appears only whole.

    The dict may hold tensors, numbers, text, booleans and None; anything else raises FrugalError.
    """
    if not conditioning:
        raise FrugalError(
            "the conditioning is empty", "at least one text embedding", "encode a prompt first"
        )
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for index, (embedding, extras) in enumerate(conditioning):
        plain: dict[str, Any] = {}
        for key, value in {EMBEDDING: embedding, **extras}.items():
            if key == EMBEDDING and value is not embedding:
                raise FrugalError(
                    f"entry {index} has an extra named {EMBEDDING}", "other names", "rename it"
                )
            if isinstance(value, torch.Tensor):
                # A clone: two entries may share one tensor, which the file format refuses.
                tensors[f"{index}.{key}"] = value.detach().to("cpu").contiguous().clone()
            elif _is_plain(value):
                plain[key] = value
            else:
                raise FrugalError(
                    f"entry {index} of the conditioning holds {ascii(key)[1:-1]} as "
                    f"{type(value).__name__}",
                    "tensors, numbers and text",
                    "save the output of the text encode node, before control or hook nodes",
                )
        entries.append({"plain": plain, "order": list(extras)})
    metadata = {MARK: json.dumps({"version": VERSION, "entries": entries})}
    write_tensors(path, tensors, metadata)


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def read_text_embeds(path: Path) -> list[list[Any]]:
    """Read a conditioning written by `write_text_embeds`, or a file with one float tensor [1,
    tokens, width].

    Raises FrugalError for a damaged file and for any other content.
    """
    header = read_header(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in header.tensors}
    if MARK not in header.metadata:
        return [[_single(path.name, tensors), {}]]
    try:
        content = json_text.parse(header.metadata[MARK])
        version = content["version"]
        entries = [(dict(entry["plain"]), list(entry["order"])) for entry in content["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FrugalError(
            f"{path.name} has damaged entries",
            "entries written by this pack",
            "save the prompt again",
        ) from error
    if version != VERSION or not entries:
        raise FrugalError(
            f"{path.name} has version {ascii(version)[:20]} and {len(entries)} entries",
            f"version {VERSION} and at least one entry",
            "save the prompt again",
        )
    conditioning = []
    for index, (plain, order) in enumerate(entries):
        prefix = f"{index}."
        stored = {
            name[len(prefix) :]: tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for key in (EMBEDDING, *order):
            if key not in stored and key not in plain:
                raise FrugalError(
                    f"{path.name} lacks {key} of entry {index}",
                    "all parts",
                    "save the prompt again",
                )
        extras = {key: stored[key] if key in stored else plain[key] for key in order}
        conditioning.append([_checked(path.name, stored.get(EMBEDDING)), extras])
    return conditioning


def _checked(name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    """Raises FrugalError for what no text encoder gives."""
    if tensor is None or tensor.dim() != 3 or not tensor.numel() or not tensor.is_floating_point():
        found = "no tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise FrugalError(
            f"{name} holds {found} as an embedding",
            "floats of shape [batch, tokens, width]",
            "save the prompt again",
        )
    if not bool(tensor.float().isfinite().all()):
        raise FrugalError(
            f"{name} holds values that are not finite", "finite numbers", "save the prompt again"
        )
    return tensor


def _single(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if len(tensors) != 1:
        raise FrugalError(
            f"{name} holds {len(tensors)} tensors",
            "one tensor [1, tokens, width], or a file saved by this pack",
            "save each prompt to a file of its own",
        )
    (tensor,) = tensors.values()
    if (
        tensor.dim() != 3
        or tensor.shape[0] != 1
        or not tensor.numel()
        or not tensor.dtype.is_floating_point
    ):
        raise FrugalError(
            f"{name} holds {tensor.dtype} {list(tensor.shape)}",
            "floats of shape [1, tokens, width]",
            "choose a text embedding",
        )
    return _checked(name, tensor)
