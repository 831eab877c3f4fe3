"""Which rows of a layer's inputs count while a model runs: a sample of each call, each row once."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.device_types import wide

# Rows are told apart by their length and two random sums, each in steps of one part in this many.
CLOSE = 1e5


class TokenPositions:
    """Which places of sequences were counted in a run, by the length of the sequence.

    A token of the latent comes again at every step, changed but akin, and in each item of the
    batch: such rows are different, and yet tell little more than one of them.
    """

    def __init__(self) -> None:
        self._seen: dict[int, torch.Tensor] = {}

    def add(self, length: int, places: torch.Tensor | None) -> None:
        """Count places int64 [n] of a sequence, None for all."""
        seen = self._seen.setdefault(length, torch.zeros(length, dtype=torch.bool))
        seen[slice(None) if places is None else places] = True

    def independent(self, length: int, rows: int) -> int:
        """How many of the rows counted in sequences of this length say something of their own. A
        single row of a call, as times are, has no place; all of those count.
        """
        return rows if length < 2 else min(rows, int(self._seen[length].sum()))


class TokenSampler:
    """What was counted during one call of the model: marks of rows by input, names of layers.

    number: that of the call. limit: largest number of rows counted. seed: which those are. places:
    those of the run.
    """

    def __init__(self, number: int, limit: int, seed: int, places: TokenPositions):
        self.number, self.limit, self.seed, self.places = number, limit, seed, places
        self.counted: dict[int, set[Any]] = {}
        self.called: set[str] = set()
        self._picks: dict[int, torch.Tensor] = {}

    def rows(self, given: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(at most `limit` of the rows of given [..., in], float32 [rows, in], length of the
        sequences in it); of inputs with as many rows the same ones.
        """
        if hasattr(given, "dequantize") and hasattr(given, "_qdata"):
            given = given.dequantize()
        flat = given.detach().reshape(-1, given.shape[-1])
        count, limit = flat.shape[0], self.limit
        length = count // given.shape[0] if given.ndim > 2 else 1
        if count <= limit:
            self.places.add(length, None)
            return flat.float(), length
        if count not in self._picks:
            make = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
            pick = torch.randperm(count, generator=make)[:limit].sort().values
            self._picks[count] = pick.to(flat.device)
            self.places.add(length, pick % length)
        return flat[self._picks[count]].float(), length


def distinct(rows: torch.Tensor) -> torch.Tensor:
    """The rows [rows, in] without those that an earlier one equals up to rounding."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide(rows.device))
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
    exact = wide(rows.device)
    sums = rows.sum(0, dtype=exact)
    along = rows @ ramp.sqrt()
    # A NaN equals nothing, which is as good: such rows are refused when the run ends.
    numbers = torch.stack([sums.sum(), (sums * ramp).sum(), along.square().sum(dtype=exact)])
    return (*rows.shape, *numbers.tolist())
