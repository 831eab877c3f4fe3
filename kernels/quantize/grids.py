"""The values a stored weight can take, format by format, as the solvers of `gptq` see them.

A grid serves some rows of one weight. It sees them transposed, [in, rows], each row divided by the
row's own scale where the format has one; that changes no row's optimum. Inputs come in runs that
share a scale. `open` gives the alternatives for a run (its scales, one line per alternative),
`snap` the nearest value of each, `keep` settles for one alternative per row, `kept` is what it
settled for.
"""

from __future__ import annotations

from typing import Protocol

import torch

INT8_TOP, FP8_TOP = 127.0, 448.0
# Neighbours of the first scale in the order of e4m3 numbers, each 6 to 12 % apart, and parts of the
# range from the smallest to the largest value.
E4M3_STEPS = (-2, -1, 0, 1, 2)
RANGE_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8)
# The lower end of a symmetric grid is one step longer: with 7/8 it still holds everything there.
SYMMETRIC_PARTS = (1.0, 0.95, 0.9, 0.875, 0.8)
SMALLEST_E4M3, LARGEST_E4M3 = 1, 0x7E
PLAIN_RUN = 32
Table = tuple[torch.Tensor, ...]


class Grid(Protocol):
    """What a solver needs of a format. `run`: inputs that share a scale."""

    run: int

    def open(self, start: int, columns: torch.Tensor) -> Table:
        """Alternatives for the run that begins at input `start`; columns [run, rows] as they are
        now.
        """
        ...

    def snap(self, table: Table, column: torch.Tensor) -> torch.Tensor:
        """Nearest values for one input: [alternatives, rows] to the same shape."""
        ...

    def keep(self, start: int, table: Table, best: torch.Tensor) -> None:
        """Settle the run for alternative best [rows] (int64), row by row."""
        ...

    def kept(self, start: int) -> Table:
        """The run's one remaining alternative."""
        ...


class CodebookGrid:
    """W4A8: 16 levels per run and row, round(codebook * scale) within +-127, scales in e4m3.

    codebook: float32 [16], rising. scales: float8_e4m3fn [rows, runs], the first choice; `scales`
    is replaced by what the solver settles for. Values are in units of the row's channel scale.
    """

    def __init__(self, codebook: torch.Tensor, scales: torch.Tensor, run: int):
        self.run, self.codebook = run, codebook
        self._bits = scales.view(torch.uint8).t().to(torch.int16).contiguous()

    @property
    def scales(self) -> torch.Tensor:
        """float8_e4m3fn [rows, runs]."""
        return _e4m3(self._bits).t().contiguous()

    def open(self, start: int, columns: torch.Tensor) -> Table:
        first = self._bits[start // self.run]
        steps = torch.tensor(E4M3_STEPS, dtype=torch.int16, device=first.device)
        return self._table((first + steps[:, None]).clamp_(SMALLEST_E4M3, LARGEST_E4M3))

    def snap(self, table: Table, column: torch.Tensor) -> torch.Tensor:
        _, levels, middles = table
        index = torch.searchsorted(middles, column.unsqueeze(-1).contiguous())
        return levels.gather(-1, index).squeeze(-1)

    def keep(self, start: int, table: Table, best: torch.Tensor) -> None:
        self._bits[start // self.run] = _pick(table[0], best)

    def kept(self, start: int) -> Table:
        return self._table(self._bits[start // self.run][None])

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 codes 0..15 [rows, in] of values [in, rows] that lie on the kept levels."""
        out = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        for start in range(0, len(values), self.run):
            _, _, middles = self.kept(start)
            part = slice(start, start + self.run)
            out[part] = torch.searchsorted(middles[0], values[part].t().contiguous()).t()
        return out.t()

    def _table(self, bits: torch.Tensor) -> Table:
        scale = _e4m3(bits).float()
        levels = (scale[..., None] * self.codebook).round_().clamp_(-INT8_TOP, INT8_TOP)
        return bits, levels, (levels[..., 1:] + levels[..., :-1]) / 2


class AffineGrid:
    """AWQ W4A16: (q - 8) * scale + zero with q from 0 to 15; scale and zero per run and row, in the
    16-bit type they are stored in.

    rows, inside: shape of the weight. kind: float16 or bfloat16. `scales` and `zeros` [runs, rows]
    are what the solver settled for.
    """

    def __init__(self, rows: int, inside: int, run: int, kind: torch.dtype, device: torch.device):
        self.run, self._kind = run, kind
        self.scales = torch.zeros(inside // run, rows, dtype=kind, device=device)
        self.zeros = torch.zeros_like(self.scales)

    def open(self, start: int, columns: torch.Tensor) -> Table:
        parts = torch.tensor(RANGE_PARTS, device=columns.device)[:, None]
        low, high = columns.amin(0), columns.amax(0)
        middle, reach = (high + low) / 2, (high - low) / 2 * parts
        # Values are chosen against scale and zero as a reader sees them, after their rounding.
        scale = (2 * reach / 15).to(self._kind).float()
        # A scale that rounds to 0 leaves one value, zero.
        zero = (middle - reach + 8 * scale).to(self._kind).float()
        return scale, zero, torch.where(scale > 0, scale, torch.ones_like(scale))

    def snap(self, table: Table, column: torch.Tensor) -> torch.Tensor:
        scale, zero, step = table
        return ((column - zero) / step).round_().clamp_(-8, 7) * scale + zero

    def keep(self, start: int, table: Table, best: torch.Tensor) -> None:
        place = start // self.run
        self.scales[place] = _pick(table[0], best).to(self._kind)
        self.zeros[place] = _pick(table[1], best).to(self._kind)

    def kept(self, start: int) -> Table:
        place = start // self.run
        scale, zero = self.scales[place][None].float(), self.zeros[place][None].float()
        return scale, zero, torch.where(scale > 0, scale, torch.ones_like(scale))

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 codes 0..15 [rows, in] of values [in, rows] that lie on the kept levels."""
        out = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        for start in range(0, len(values), self.run):
            _, zero, step = self.kept(start)
            part = slice(start, start + self.run)
            out[part] = ((values[part] - zero) / step).round_().add_(8).clamp_(0, 15)
        return out.t()


class SymmetricGrid(AffineGrid):
    """GPTQ's symmetric 4 bits: (q - 8) * scale with q from 0 to 15, a scale per run and row.

    Scales are values that float16 and bfloat16 both hold: the file keeps the first, a server in
    bfloat16 reads them into the second, and nothing is rounded on the way.
    """

    def __init__(self, rows: int, inside: int, run: int, device: torch.device):
        super().__init__(rows, inside, run, torch.float16, device)

    def open(self, start: int, columns: torch.Tensor) -> Table:
        parts = torch.tensor(SYMMETRIC_PARTS, device=columns.device)[:, None]
        reach = columns.abs().amax(0) / 7 * parts
        scale = reach.to(torch.bfloat16).to(self._kind).float()
        return scale, torch.zeros_like(scale), torch.where(scale > 0, scale, 1.0)


class PlainGrid:
    """One scale per row or for all, settled before: int8 (integers within +-127) or fp8 e4m3 within
    +-448. Values are in units of that scale.
    """

    run = PLAIN_RUN

    def __init__(self, float8: bool):
        self._float8 = float8

    def open(self, start: int, columns: torch.Tensor) -> Table:
        return (columns.new_ones(1, 1),)

    def snap(self, table: Table, column: torch.Tensor) -> torch.Tensor:
        if self._float8:
            return column.clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).float()
        return column.round().clamp_(-INT8_TOP, INT8_TOP)

    def keep(self, start: int, table: Table, best: torch.Tensor) -> None:
        pass

    def kept(self, start: int) -> Table:
        return ()


def _e4m3(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.uint8).view(torch.float8_e4m3fn)


def _pick(table: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    return table.expand(-1, best.shape[0]).gather(0, best[None])[0]
