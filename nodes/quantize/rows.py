"""Which rows of a layer's inputs count while a model runs: a sample of each call, each row once."""

from __future__ import annotations

from typing import Any

import torch

# Rows are told apart by their length and two random sums, each in steps of one part in this many.
CLOSE = 1e5


class Seen:
    """What was counted during one call of the model: marks of rows by input, names of layers.

    number: that of the call. limit: largest number of rows counted. seed: which those are.
    """

    def __init__(self, number: int, limit: int, seed: int):
        self.number, self.limit, self.seed = number, limit, seed
        self.counted: dict[int, set[Any]] = {}
        self.called: set[str] = set()
        self._picks: dict[int, torch.Tensor] = {}

    def rows(self, given: torch.Tensor) -> torch.Tensor:
        """At most `limit` of the rows of given [..., in], float32 [rows, in]; of inputs
        with as many rows the same ones.
        """
        if hasattr(given, "dequantize") and hasattr(given, "_qdata"):
            given = given.dequantize()
        flat = given.detach().reshape(-1, given.shape[-1])
        count, limit = flat.shape[0], self.limit
        if count <= limit:
            return flat.float()
        if count not in self._picks:
            make = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
            pick = torch.randperm(count, generator=make)[:limit].sort().values
            self._picks[count] = pick.to(flat.device)
        return flat[self._picks[count]].float()


def distinct(rows: torch.Tensor) -> torch.Tensor:
    """The rows [rows, in] without those that an earlier one equals up to rounding."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    if not bool(torch.isfinite(length).all()):
        return rows
    make = torch.Generator().manual_seed(0)
    look = torch.randn(rows.shape[1], 2, generator=make).to(rows.device)
    length.clamp_(min=1e-30)
    seen = (torch.cat([(rows @ look) / length, length.log()], dim=1) * CLOSE).round()
    _, group = torch.unique(seen, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(places, len(rows)).scatter_reduce_(0, group, places, "amin")
    first = first[first < len(rows)]
    return rows if len(first) == len(rows) else rows[first.sort().values]


def mark_of(rows: torch.Tensor) -> tuple[Any, ...]:
    """Equal for equal rows [rows, in], and for others practically never."""
    ramp = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32)
    sums = rows.sum(0, dtype=torch.float64)
    along = rows @ ramp.sqrt()
    # A NaN equals nothing, which is as good: such rows are refused when the run ends.
    numbers = torch.stack(
        [sums.sum(), (sums * ramp).sum(), along.square().sum(dtype=torch.float64)]
    )
    return (*rows.shape, *numbers.tolist())
