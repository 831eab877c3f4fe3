"""A bounded table of prompts and of what was computed from each, found again by content."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from .projected_rows import Distinct, KeptRows, distinct, same_bits


@dataclass(frozen=True)
class Context:
    """inputs [batch, rows, width]: the tensor that the layers were given. state: whatever else the
    values depend on. repeats: where the inputs repeat themselves. values: layer -> what it made of
    them.
    """

    inputs: torch.Tensor
    state: Hashable
    repeats: Distinct
    values: dict[Any, KeptRows] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + sum(kept.nbytes for kept in self.values.values())


class Contexts:
    """At most `limit` contexts; the least recently used is evicted. `made` and `dropped`
    count.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.made = self.dropped = 0
        self._kept: list[Context] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(context.nbytes for context in self._kept)

    def of(self, inputs: torch.Tensor, state: Hashable) -> Context:
        """The context with the same state and, bit for bit, the same inputs [batch, rows, width];
        a new one if there is none.
        """
        places = [i for i, context in enumerate(self._kept) if context.state == state]
        equal = same_bits([self._kept[place].inputs for place in places], inputs)
        for place in reversed([place for place, same in zip(places, equal, strict=True) if same]):
            self._kept.append(self._kept.pop(place))
            return self._kept[-1]
        while len(self._kept) >= self.limit:
            self._kept.pop(0)
            self.dropped += 1
        # A copy: what was given may be part of something larger, or be written to later.
        context = Context(inputs.clone(), state, distinct(inputs))
        self._kept.append(context)
        self.made += 1
        return context
