"""Second moments of a layer's inputs, H = mean of x^T x over rows x, gathered while a model runs.

Kept whole where the memory allows, else as a sketch: the running product of H with a fixed random
matrix. The sketch of a positive semidefinite matrix gives its largest directions (Tropp et al.,
Fixed-rank approximation of a positive-semidefinite matrix from streaming data, arXiv 1706.05736),
and the diagonal is counted exactly beside it, so what the directions miss is kept as independent
inputs of the right size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device_types import wide
from ..errors import FrugalError

# Output rows of x^T x computed at a time: bounds the memory on the device.
PANEL = 2048
# Directions kept of a sketch, as a part of its columns; the rest made the others accurate.
KEPT = 0.5
# Relative size of the shift that keeps the sketch's core positive definite (arXiv 1706.05736), ten
# times more where sums in float32 have lost too many digits for it.
SHIFT = 1e-6
FEWEST = 16


@dataclass(frozen=True)
class Moment:
    """H of one input, as it is stored.

    rows: how many x were seen. diagonal: float32 [in], exact. One of: correlation, float16 [in *
    (in + 1) / 2], the upper triangle of H over the square roots of its diagonal, row by row;
    factor, float16 [in, directions], with factor factor^T close to that same matrix. independent:
    how many of the rows say something of their own; 0 stands for all.
    """

    rows: int
    diagonal: torch.Tensor
    correlation: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    independent: int = 0

    @property
    def width(self) -> int:
        return self.diagonal.shape[0]

    def dense(self) -> torch.Tensor:
        """H as float32 [in, in], symmetric, with the exact diagonal."""
        size = self.width
        if self.factor is not None:
            factor = self.factor.float()
            made = factor @ factor.t()
        elif self.correlation is not None:
            made = torch.zeros(size, size)
            place = 0
            for row in range(size):
                made[row, row:] = self.correlation[place : place + size - row]
                place += size - row
        else:
            raise FrugalError("statistics without a matrix", "one", "calibrate again")
        root = self.diagonal.clamp(min=0).sqrt()
        made *= root[:, None]
        made *= root
        made.diagonal().copy_(self.diagonal)
        _mirror(made)
        return made


def _mirror(matrix: torch.Tensor) -> None:
    """Make a square matrix symmetric, in place, by what is right of its diagonal."""
    for start in range(0, len(matrix), PANEL):
        stop = start + PANEL
        matrix[stop:, start:stop] = matrix[start:stop, stop:].t()
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).t())


class Directions:
    """The random matrices of sketches, one for each size, standard normal over sqrt(width); the
    same for the same seed.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._made: dict[tuple[int, int, str], torch.Tensor] = {}

    def get(self, width: int, columns: int, device: torch.device) -> torch.Tensor:
        """float32 [width, columns]."""
        key = (width, columns, str(device))
        if key not in self._made:
            make = torch.Generator().manual_seed(self.seed)
            made = torch.randn(width, columns, generator=make) / math.sqrt(width)
            self._made[key] = made.to(device)
        return self._made[key]


class Gatherer:
    """Sums over the rows of one input; the sums are on the CPU in float32.

    width: inputs. columns: how many columns of memory it may take; from `width` up H is exact.
    directions: the random matrices of sketches, which inputs of one width share.
    """

    def __init__(self, width: int, columns: int, directions: Directions | None = None):
        if columns < min(width, FEWEST):
            raise FrugalError(
                f"room for {columns} columns of statistics per input",
                f"at least {FEWEST}",
                "allow more memory",
            )
        self.width, self.columns = width, min(width, columns)
        self._directions = directions or Directions(0)
        self.rows = 0
        self._total = torch.zeros(width, self.columns)
        self._squares = torch.zeros(width, dtype=torch.float64)

    @property
    def exact(self) -> bool:
        return self.columns == self.width

    def add(self, rows: torch.Tensor) -> None:
        """Count rows [m, in], any float type, on any device; they are not changed."""
        rows = rows.detach().float()
        self.rows += len(rows)
        self._squares += rows.square().sum(0, dtype=wide(rows.device)).cpu()
        right = (
            rows
            if self.exact
            else rows @ self._directions.get(self.width, self.columns, rows.device)
        )
        for start in range(0, self.width, PANEL):
            part = slice(start, start + PANEL)
            # Of a symmetric sum only what is on or right of the diagonal is counted.
            first = start if self.exact else 0
            self._total[part, first:] += (rows[:, part].t() @ right[:, first:]).cpu()

    def moment(self, name: str, device: torch.device | str = "cpu") -> Moment:
        """What was gathered; the sketch is solved on `device`. `name` is for the error raised where
        nothing, or something not finite, was counted.
        """
        diagonal = (self._squares / max(1, self.rows)).float()
        if not self.rows or not bool(torch.isfinite(diagonal).all()):
            raise FrugalError(
                f"the inputs of {name} are {'not finite' if self.rows else 'none'}",
                "finite inputs",
                "sample with settings that give a picture, then calibrate again",
            )
        root = diagonal.clamp(min=0).sqrt()
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        if self.exact:
            return Moment(self.rows, diagonal, correlation=self._correlation(inverse))
        found = self._factor(torch.device(device)).cpu() * inverse[:, None]
        return Moment(self.rows, diagonal, factor=found.half())

    def _correlation(self, inverse: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.width * (self.width + 1) // 2, dtype=torch.float16)
        place = 0
        for row in range(self.width):
            size = self.width - row
            scaled = self._total[row, row:] / self.rows * inverse[row] * inverse[row:]
            out[place : place + size] = scaled.clamp(-1, 1).half()
            place += size
        return out

    def _factor(self, device: torch.device) -> torch.Tensor:
        """[in, kept] with factor factor^T the best approximation of H that the sketch holds."""
        random = self._directions.get(self.width, self.columns, device)
        sketch = (self._total / self.rows).to(device)
        size = float(torch.linalg.vector_norm(sketch)) or 1.0
        for shift in (SHIFT * size * 10**power for power in range(5)):
            shifted = (sketch + shift * random).double()
            core = random.t().double() @ shifted
            lower, info = torch.linalg.cholesky_ex((core + core.t()) / 2)
            if int(info) == 0:
                break
        else:
            raise FrugalError(
                "a sketch of statistics that is not positive",
                "sums of squares",
                "allow more memory, or report this to ComfyUI-Frugal",
            )
        half = torch.linalg.solve_triangular(lower, shifted.t(), upper=False).t()
        # The small side's eigenvectors give the large side's: half is [in, columns].
        values, vectors = torch.linalg.eigh(half.t() @ half)
        kept = max(1, int(self.columns * KEPT))
        values, vectors = values[-kept:], vectors[:, -kept:]
        scale = ((values - shift).clamp(min=0) / values.clamp(min=1e-300)).sqrt()
        return ((half @ vectors) * scale).float()


def columns_within(widths: Sequence[int], memory: int) -> int:
    """The most columns for each of the inputs of these widths that stay within `memory` bytes.

    An input takes width * min(width, columns) * 4 bytes. Raises FrugalError where not even FEWEST
    fit.
    """

    def taken(columns: int) -> int:
        return sum(4 * width * min(width, columns) for width in widths)

    low, high = 0, max(widths, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= memory else (low, middle - 1)
    if low < FEWEST and low < max(widths, default=0):
        raise FrugalError(
            f"{memory / 1e9:g} GB for the statistics of {len(widths)} inputs",
            f"at least {taken(FEWEST) / 1e9:.2f} GB",
            "allow more memory",
        )
    return low


def merged(one: Moment, other: Moment) -> Moment:
    """The moment of all rows of two of the same width; of two sketches the larger number of
    directions is kept.
    """
    if one.width != other.width:
        raise FrugalError(
            f"statistics of {one.width} and {other.width} inputs", "one width", "start a new file"
        )
    rows = one.rows + other.rows
    alone = sum(moment.independent or moment.rows for moment in (one, other))
    shares = [one.rows / rows, other.rows / rows]
    diagonal = one.diagonal * shares[0] + other.diagonal * shares[1]
    root = diagonal.clamp(min=0).sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    roots = [moment.diagonal.clamp(min=0).sqrt() * inverse for moment in (one, other)]
    if one.factor is None or other.factor is None:
        total = one.dense() * shares[0] + other.dense() * shares[1]
        gatherer = Gatherer(one.width, one.width)
        gatherer.rows, gatherer._total = 1, total
        found = gatherer._correlation(inverse)
        return Moment(rows, diagonal, correlation=found, independent=alone)
    pieces = [
        moment.factor.float() * scale[:, None] * share**0.5
        for moment, scale, share in zip((one, other), roots, shares, strict=True)
        if moment.factor is not None
    ]
    both = torch.cat(pieces, dim=1).double()
    kept = max(piece.shape[1] for piece in pieces)
    _, vectors = torch.linalg.eigh(both.t() @ both)
    factor = (both @ vectors[:, -kept:]).half()
    return Moment(rows, diagonal, factor=factor, independent=alone)
