"""Damage to a file, by chance and reproducible: bytes, and the JSON that formats begin with."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 1e308, float("nan"), "", "\ud800", "a" * 5000, "../x",
    "NaN", [], {}, [[]], [0, 0], [-1, 5], [2**62, 2**62], {"a": {}}, "F64", "F8_E8M0", "BOOL",
    "fp8", "\0",
)  # fmt: skip


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """`whole` with one to three faults."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        whole = chance.choice(FAULTS)(whole, chance)
    return whole


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _flip(data: bytes, chance: random.Random) -> bytes:
    # The first bytes decide most, so they are hit more often.
    if not data:
        return data
    made = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(min(len(made), chance.choice((16, 200, 4000, len(made)))))
        made[at] ^= 1 << chance.randrange(8)
    return bytes(made)


def _fill(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    count = min(len(data) - start, chance.randint(1, 64))
    return (
        data[:start] + bytes([chance.choice((0, 255, 0x7F, 0x80))]) * count + data[start + count :]
    )


def _insert(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + chance.randbytes(chance.randint(1, 16)) + data[start:]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start : start + 64] + data[start:]


def _safetensors_header(data: bytes, chance: random.Random) -> bytes:
    """One value of the header replaced, with a length that fits it."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return _flip(data, chance)
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return _flip(data, chance)
    raw = json.dumps(strange_json(header, chance)).encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


FAULTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut, _flip, _flip, _fill, _insert, _repeat, _safetensors_header, _safetensors_header,
)  # fmt: skip


def strange_json(value: Any, chance: random.Random) -> Any:
    """`value` with one part replaced, taken out, renamed or nested deeply."""
    places = list(_places(value))
    if not places:
        return chance.choice(STRANGE)
    holder, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0 and isinstance(holder, dict):
        holder[key + chance.choice(("\u732b", ".weight", " ", "_x"))] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        # Values that are JSON themselves, as metadata are.
        holder[key] = "[" * 5000
    elif kind == 3 and isinstance(holder[key], str):
        try:
            holder[key] = json.dumps(strange_json(json.loads(holder[key]), chance))
        except ValueError:
            holder[key] = holder[key][::-1]
    elif kind == 4 and isinstance(holder[key], int):
        holder[key] += chance.choice((-8, -1, 1, 8))
    else:
        holder[key] = chance.choice(STRANGE)
    return value


def _places(value: Any):
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return
    for key, each in list(items):
        yield value, key
        yield from _places(each)


def strange_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    """One tensor of a whole file changed in place: its name, type, shape or one of its numbers."""
    name = chance.choice(sorted(tensors))
    if chance.random() < 0.5:
        # Scales and their kin are few and decide most.
        small = sorted(key for key in tensors if not key.endswith((".weight", ".bias")))
        name = chance.choice(small or [name])
    tensor, kind = tensors[name], chance.randrange(8)
    if kind == 0:
        tensors[name + chance.choice((".x", "_2", "s"))] = tensors.pop(name)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[name] = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1)
    elif kind == 3:
        tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor.reshape(-1, 1)
    elif kind == 4:
        tensors[name] = tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor[None]
    elif kind == 5:
        kinds = (torch.int8, torch.bool, torch.float64, torch.float16, torch.float8_e4m3fn)
        tensors[name] = tensor.float().to(chance.choice(kinds))
    elif kind == 6:
        tensors[name] = torch.full_like(tensor.float(), chance.choice((-1.0, 0.0, 1e30)))
    else:
        made = tensor.float().clone()
        if made.numel():
            made.view(-1)[chance.randrange(made.numel())] = chance.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
        tensors[name] = made.to(tensor.dtype) if tensor.is_floating_point() else made
