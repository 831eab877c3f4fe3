"""What one projection makes of a prompt, kept for later steps without a bit of change.

A prompt is padded to 512 tokens and all padding is alike, so the rows after the last word are one
row many times over: it is kept once. So is a start image that a batch has beside each prompt. The
attention still sees every row. Giving it one row with a bias of log(copies) instead would be the
same sum in another order, which is another rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..formats.fp8_linear import round_tokens

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: -0 and 0 differ there, and NaN equals itself."""
    return x.view(_INTEGERS[x.element_size()])


def same_bits(others: Sequence[torch.Tensor], one: torch.Tensor) -> list[bool]:
    """Which tensors agree with `one` in shape, dtype, device and every bit. Waits for the device
    once, and not at all where the rest tells them apart.
    """
    kind = one.shape, one.dtype, one.device
    like = [(other.shape, other.dtype, other.device) == kind for other in others]
    found = [
        (bits(other) == bits(one)).all() for other, fits in zip(others, like, strict=True) if fits
    ]
    equal = iter(torch.stack(found).tolist() if found else ())
    return [fits and next(equal) for fits in like]


@dataclass(frozen=True)
class Distinct:
    """Where a tensor [batch, rows, width] repeats itself. rows: how many leading rows hold
    everything, the rest of each batch item being copies of its last row. items: for each batch
    item the first one that it equals.
    """

    rows: int
    items: tuple[int, ...]


def distinct(x: torch.Tensor) -> Distinct:
    """Of x [batch, rows, width], bit for bit. Waits for the device."""
    raw = bits(x)
    places = (raw != raw[:, -1:]).any(-1).any(0).nonzero()
    rows = int(places[-1]) + 2 if len(places) else min(1, x.shape[1])
    items: list[int] = []
    for item in range(len(raw)):
        found = (first for first in dict.fromkeys(items) if torch.equal(raw[first], raw[item]))
        items.append(next(found, item))
    return Distinct(rows, tuple(items))


@dataclass(frozen=True)
class KeptRows:
    """rows [kept items, kept rows, width] in their own dtype, or float8_e4m3fn with scale
    [kept items, kept rows, 1]. Given back in `dtype`: `length` rows for each of `items`, which are
    places among the kept ones.
    """

    rows: torch.Tensor
    length: int
    items: tuple[int, ...]
    dtype: torch.dtype
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def tensor(self) -> torch.Tensor:
        """[batch, length, width], contiguous, in memory of its own: a caller may write to it."""
        rows = self.rows
        if self.scale is not None:
            rows = (rows.float() * self.scale).to(self.dtype)
        out = rows.new_empty(len(self.items), self.length, rows.shape[2])
        for item, place in enumerate(self.items):
            out[item, : rows.shape[1]] = rows[place]
            out[item, rows.shape[1] :] = rows[place, -1:]
        return out


def keep(values: torch.Tensor, repeats: Distinct, fp8: bool = False) -> KeptRows:
    """values [batch, rows, width] of an input that repeats itself as `repeats` says.

    A product may round equal rows differently where a kernel works in tiles; then all are kept.
    fp8: float8_e4m3fn with one scale per row, for values of 2 bytes and more.
    """
    raw, length = bits(values), values.shape[1]
    rows, items = length, tuple(range(len(values)))
    flags = [(raw[first] == raw[item]).all() for item, first in enumerate(repeats.items)]
    if repeats.rows < length:
        flags.append((raw[:, repeats.rows :] == raw[:, repeats.rows - 1, None]).all())
    found = torch.stack(flags).tolist() if flags else []
    if repeats.rows < length and found.pop():
        rows = repeats.rows
    if all(found):
        items = repeats.items
    kept = sorted(set(items))
    stored = torch.stack([values[item, :rows] for item in kept])
    places = tuple(kept.index(first) for first in items)
    if not fp8:
        return KeptRows(stored, length, places, values.dtype)
    data, scale = round_tokens(stored.reshape(-1, values.shape[2]))
    shape = stored.shape[:2]
    return KeptRows(data.view(*shape, -1), length, places, values.dtype, scale.view(*shape, 1))
