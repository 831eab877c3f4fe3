"""What one projection makes of a prompt, kept for later steps without a bit of change.

A prompt is padded to 512 tokens and all padding is alike, so the rows after the last word are one
row many times over: it is kept once. The attention still sees every row. Giving it one row with a
bias of log(copies) instead would be the same sum in another order, which is another rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..quant.fp8_linear import round_tokens

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: -0 and 0 differ there, and NaN equals itself."""
    return x.view(_INTEGERS[x.element_size()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and every bit. Waits for the device."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.device == other.device
        and torch.equal(bits(one), bits(other))
    )


def distinct_rows(x: torch.Tensor) -> int:
    """x [batch, rows, width]: how many leading rows hold everything, the rest of each batch item
    being copies of its last row. rows if nothing repeats at the end.
    """
    raw = bits(x)
    places = (raw != raw[:, -1:]).any(-1).any(0).nonzero()
    return int(places[-1]) + 2 if len(places) else min(1, x.shape[1])


@dataclass(frozen=True)
class KeptRows:
    """rows [batch, kept, width] in their own dtype, or float8_e4m3fn with scale [batch, kept, 1];
    `length` rows are given back, in `dtype`.
    """

    rows: torch.Tensor
    length: int
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
        copies = self.length - rows.shape[1]
        if copies:
            return torch.cat([rows, rows[:, -1:].expand(-1, copies, -1)], dim=1)
        return rows.clone() if self.scale is None else rows


def keep(values: torch.Tensor, distinct: int, fp8: bool = False) -> KeptRows:
    """values [batch, rows, width] of an input with `distinct` leading rows.

    A product may round equal rows differently where a kernel works in tiles; then all are kept.
    fp8: float8_e4m3fn with one scale per row, for values of 2 bytes and more.
    """
    length = values.shape[1]
    last = bits(values[:, distinct - 1 : distinct])
    repeated = distinct < length and bool((bits(values[:, distinct:]) == last).all())
    rows = values[:, :distinct] if repeated else values
    if not fp8:
        return KeptRows(rows.clone(memory_format=torch.contiguous_format), length, values.dtype)
    batch, kept, width = rows.shape
    stored, scale = round_tokens(rows.reshape(-1, width))
    return KeptRows(
        stored.view(batch, kept, width), length, values.dtype, scale.view(batch, kept, 1)
    )
