"""What a LoRA, LoHa or LoKr file adds to a linear layer, as factors that are applied to the layer's
input: the layer's weight, in whatever format, is never touched.

For W [out, in] and a change D, y = x W^T + strength * x D^T. LoRA (arXiv 2106.09685) and LoHa
(arXiv 2108.06098) give D = scale * left right; LoKr (arXiv 2309.14859) gives
D = scale * kron(outer, inner), each of the two dense or a product. DoRA (arXiv 2402.09353)
replaces W by magnitude * (W + D) / ||W + D||, norms over each row: a gain for every output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

# Rows of a LoKr product at a time: bounds what it takes beside the layer's output.
CHUNK = 4096


@dataclass(frozen=True)
class Delta:
    """D [out, in] = scale * kron(O, I): I is the product of the matrices `inner`, leftmost first,
    and O that of `outer`; without `outer`, D = scale * I. Any float dtype.
    """

    inner: tuple[torch.Tensor, ...]
    outer: tuple[torch.Tensor, ...] = ()
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        pairs = [(side[0].shape[0], side[-1].shape[1]) for side in (self.outer, self.inner) if side]
        return prod(rows for rows, _ in pairs), prod(columns for _, columns in pairs)

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        return (*self.outer, *self.inner)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """D itself, [out, in] in `dtype`: for checks, and for norms."""
        inner = _product(self.inner, dtype)
        if self.outer:
            inner = torch.kron(_product(self.outer, dtype), inner)
        return self.scale * inner

    def scaled_rows(self, factors: torch.Tensor) -> Delta:
        """diag(factors) D for factors [out]. Raises ValueError for a Kronecker product, whose rows
        have no factors of their own.
        """
        if self.outer:
            raise ValueError("the rows of a Kronecker product are not scaled one by one")
        first = self.inner[0].float() * factors.float()[:, None]
        return replace(self, inner=(first, *self.inner[1:]))


def lora(up: torch.Tensor, down: torch.Tensor, alpha: float | None) -> Delta:
    """LoRA: up [out, r], down [r, in], D = alpha / r * up down; alpha None means r."""
    return Delta((up, down), scale=1.0 if alpha is None else alpha / down.shape[0])


def loha(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    alpha: float | None,
) -> Delta | None:
    """LoHa: D = alpha / r * (a1 b1) * (a2 b2), a [out, r], b [r, in], the middle product entry by
    entry. It has rank r1 * r2: every column of a1 times every column of a2, and likewise for rows.
    None if that takes more than D itself.
    """
    (a1, b1), (a2, b2) = first, second
    out, width, rank = a1.shape[0], b1.shape[1], a1.shape[1] * a2.shape[1]
    if rank * (out + width) > out * width:
        return None
    up = (a1.float()[:, :, None] * a2.float()[:, None, :]).reshape(out, rank)
    down = (b1.float()[:, None, :] * b2.float()[None, :, :]).reshape(rank, width)
    return Delta((up, down), scale=1.0 if alpha is None else alpha / b1.shape[0])


def lokr(
    outer: tuple[torch.Tensor, ...], inner: tuple[torch.Tensor, ...], alpha: float | None
) -> Delta:
    """LoKr: D = scale * kron(outer, inner), each one dense matrix or a pair (left, right).

    scale is alpha / r where a side is a pair of rank r (the inner's if both are), else 1.
    """
    ranks = [side[1].shape[0] for side in (inner, outer) if len(side) == 2]
    scale = alpha / ranks[0] if ranks and alpha is not None else 1.0
    return Delta(inner, outer, scale)


def dora_gain(weight: torch.Tensor, delta: Delta, magnitude: torch.Tensor) -> torch.Tensor:
    """magnitude / ||W + D|| over rows, float32 [out]. weight [out, in] float, dequantised;
    magnitude [out] or [out, 1].
    """
    changed = weight.float() + delta.dense().to(weight.device)
    norm = changed.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return magnitude.float().flatten().to(norm.device) / norm


class Matrix(Protocol):
    """A matrix M [rows, columns] that may lie elsewhere until it is used."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] -> x M^T [..., rows], in x's dtype."""
        ...

    def add_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out [n, rows] += x M^T for x [n, columns] of out's dtype, in place."""
        ...


class HeldMatrix:
    """A `Matrix` in memory: the tensor [rows, columns] itself."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.tensor.to(x))

    def add_(self, out: torch.Tensor, x: torch.Tensor) -> None:
        out.addmm_(x, self.tensor.to(x).t())


@dataclass(frozen=True)
class Branch:
    """A `Delta` ready to run: matrices in the order of `Delta.inner` and `Delta.outer`.

    `place` is (axis, start) where the delta belongs to a part of a fused layer: axis 0 counts its
    outputs, axis 1 its inputs.
    """

    inner: Sequence[Matrix]
    outer: Sequence[Matrix]
    scale: float
    shape: tuple[int, int]
    inner_columns: int
    place: tuple[int, int] | None = None

    def add_(self, out: torch.Tensor, x: torch.Tensor, strength: float) -> None:
        """out [n, out] += strength * x D^T in place, for x [n, in] of any float dtype. Nothing as
        large as out is made beside it.
        """
        rows, columns = self.shape
        if self.place is not None:
            axis, start = self.place
            if axis == 0:
                out = out.narrow(1, start, rows)
            else:
                x = x.narrow(1, start, columns)
        factor = self.scale * strength
        if self.outer:
            for first in range(0, x.shape[0], CHUNK):
                part = slice(first, first + CHUNK)
                self._add_kronecker_(out[part], x[part], factor)
            return
        hidden = _through(self.inner[1:], x)
        self.inner[0].add_(out, (hidden * factor).to(out.dtype))

    def _add_kronecker_(self, out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        inner_columns = self.inner_columns
        hidden = _through(self.inner, x.unflatten(1, (-1, inner_columns)))
        hidden = _through(self.outer, hidden.transpose(1, 2))
        out.add_(hidden.transpose(1, 2).reshape(x.shape[0], -1), alpha=factor)


def branch(
    delta: Delta,
    place: tuple[int, int] | None = None,
    held: Callable[[torch.Tensor], Matrix] = HeldMatrix,
) -> Branch:
    """The branch of a delta; `held` says how a matrix is kept."""
    return Branch(
        [held(matrix) for matrix in delta.inner],
        [held(matrix) for matrix in delta.outer],
        delta.scale,
        delta.shape,
        delta.inner[-1].shape[1],
        place,
    )


def _through(matrices: Sequence[Matrix], x: torch.Tensor) -> torch.Tensor:
    for matrix in reversed(matrices):
        x = matrix(x)
    return x


def _product(matrices: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    found = matrices[0].to(dtype)
    for matrix in matrices[1:]:
        found = found @ matrix.to(dtype)
    return found
