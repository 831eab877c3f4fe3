"""GPTQ on the grids of ComfyUI's own 4-bit formats: codes and scales that keep a layer's output,
not its weights.

For inputs x the output error of a row is e H e^T with H the mean of x^T x. Frantar et al. (GPTQ,
arXiv 2210.17323): inputs are rounded one after the other, and the error of each is made up for by
those still to come, through the upper Cholesky factor of the inverse of H. On top of that, each of
which measures better on the test layers of bench/gptq.py:

- runs of inputs that share a scale are taken in falling order of their mean square (the paper's
  act-order, by runs, so that scales stay where the format has them);
- the scale of a run is chosen when it is reached, among neighbours on the stored scale's own grid,
  as the one with the least error after the run;
- at the end each code is chosen again against all others (coordinate descent on e H e^T);
- H is drawn towards its diagonal the more, the fewer inputs were counted (shrink.py).

Rows are independent, so they are solved in parts of bounded size. Nothing is random: the same
inputs on the same device give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..device_types import wide
from ..errors import FrugalError
from ..formats import codec
from ..formats import table as formats
from ..formats.rotation import rotate
from ..log import LOG
from .grids import AffineGrid, CodebookGrid, Grid
from .shrinkage import shrink_

if TYPE_CHECKING:
    from .calibration import LayerStatistics

DAMPING, DAMPING_STEP, LARGEST_DAMPING = 0.01, 10.0, 10.0
BLOCK = 128
SWEEPS = 2
# Values of a weight solved at a time: the working memory is about six times that in float32.
PART = 1 << 24


@dataclass(frozen=True)
class Curvature:
    """H of a layer's inputs made ready for solving.

    hessian: float32 [in, in], damped, in the basis and order of solving. upper: its inverse is
    upper^T upper. order: int64 [in], the input at each place. damping: part of the mean diagonal
    that was added. shrunk: part taken from what is off the diagonal, for want of inputs.
    """

    hessian: torch.Tensor
    upper: torch.Tensor
    order: torch.Tensor
    damping: float
    shrunk: float = 0.0


def solve(
    target: str,
    weight: torch.Tensor,
    statistics: LayerStatistics,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float weight [out, in] in a 4-bit `target` (formats.W4A8, W4A8_G64 or
    AWQ), without the declaration, on the CPU; computed on `device`. Nothing is random.

    Raises FrugalError if the statistics have another width, or hold values that are not finite.
    """
    settings = formats.options(target, (weight.shape[0], weight.shape[1]))
    rotation, run = settings.get("convrot_groupsize", 0), settings["group_size"]
    shape = curvature(statistics, weight.shape[1], rotation, run, torch.device(device))
    make = _awq if target == formats.AWQ else _w4a8
    return make(target, weight, shape, rotation, run)


def curvature(
    statistics: LayerStatistics, width: int, rotation: int, run: int, device: torch.device
) -> Curvature:
    """`prepare` for a layer's statistics, kept for the next layer that has the same input.

    Raises FrugalError if the statistics are not those of `width` inputs.
    """
    if statistics.width != width:
        raise FrugalError(
            f"the calibration of {statistics.name} has {statistics.width} inputs",
            f"{width}, as the weight has",
            "use a calibration file of the same model",
        )
    key = (statistics.key, rotation, run, str(device))
    return statistics.memo.get(
        key,
        lambda: prepare(
            statistics.hessian(), rotation, run, device, statistics.name, statistics.independent
        ),
    )


def prepare(
    hessian: torch.Tensor,
    rotation: int,
    run: int,
    device: torch.device,
    name: str = "a layer",
    rows: int = 0,
) -> Curvature:
    """Shrink, rotate, order, damp and factorise H, float32 [in, in], symmetric; it is not changed.

    rotation: group of ConvRot, 0 for none. run: inputs that stay together. rows: how many inputs H
    is the mean of, 0 for enough. Damping adds 1 % of the
    mean diagonal, ten times more whenever the factorisation fails; a raise is logged. Inputs that
    were always 0 end up with the damping alone, which rounds them to nearest.
    """
    made = hessian.to(device=device, dtype=torch.float32, copy=True)
    if not bool(torch.isfinite(made.diagonal()).all()):
        raise FrugalError(
            f"the calibration of {name} is not finite", "finite statistics", "calibrate again"
        )
    shrunk = shrink_(made, rows)
    if rotation:
        made = rotate(rotate(made, rotation).t().contiguous(), rotation)
    order = _order(made.diagonal(), run)
    made = made[order][:, order]
    mean = float(made.diagonal().mean())
    if mean <= 0:
        made, mean = torch.eye(len(made), device=device), 1.0
    damping, added = DAMPING, 0.0
    while True:
        made.diagonal().add_((damping - added) * mean)
        added = damping
        upper = _inverse_factor(made)
        if upper is not None:
            break
        damping *= DAMPING_STEP
        if damping > LARGEST_DAMPING:
            raise FrugalError(
                f"the statistics of {name} cannot be factorised even with damping {added:g}",
                "statistics of at least as many inputs as the layer has, without NaN",
                "calibrate again with more steps",
            )
        LOG.warning("[Frugal] %s: damping raised to %g of the mean diagonal", name, damping)
    return Curvature(made, upper, order, added, shrunk)


def _order(diagonal: torch.Tensor, run: int) -> torch.Tensor:
    runs = diagonal.reshape(-1, run).sum(1).argsort(descending=True, stable=True)
    within = torch.arange(run, device=diagonal.device)
    return (runs[:, None] * run + within).reshape(-1)


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U^T U the inverse of the matrix; None if it is not positive definite.

    With both axes reversed, matrix = L L^T gives matrix = R R^T with R upper triangular, so that U
    is the inverse of R: no inverse of the matrix itself is formed, which costs digits.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info.max()) != 0:
        return None
    # The inverse of a reversed triangle is the reversed inverse.
    identity = torch.eye(len(matrix), device=matrix.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if bool(torch.isfinite(upper.diagonal()).all()) else None


def solve_rows(columns: torch.Tensor, shape: Curvature, grid: Grid) -> torch.Tensor:
    """Values on the grid for columns [in, rows] in the order of solving, same shape; columns stay
    as they are.
    """
    values = feed_forward(columns.clone(), shape.upper, grid)
    for _ in range(SWEEPS):
        descend(values, columns, shape.hessian, grid)
    return values


def feed_forward(columns: torch.Tensor, upper: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ proper: values [in, rows] for columns [in, rows], which are used up."""
    values = torch.empty_like(columns)
    block = max(BLOCK, grid.run)
    for start, stop in _spans(0, len(columns), block):
        errors = torch.empty_like(columns[start:stop])
        for first, last in _spans(start, stop, grid.run):
            table = grid.open(first, columns[first:last])
            local = upper[first:last, first:last]
            tried, scaled = _run(columns[first:last], local, grid, table)
            best = scaled.square().sum(0).argmin(0)
            grid.keep(first, table, best)
            index = best.expand(last - first, 1, -1)
            values[first:last] = tried.gather(1, index)[:, 0]
            errors[first - start : last - start] = scaled.gather(1, index)[:, 0]
            columns[last:stop] -= (
                upper[first:last, last:stop].t() @ errors[first - start : last - start]
            )
        columns[stop:] -= upper[start:stop, stop:].t() @ errors
    return values


def _run(
    columns: torch.Tensor, upper: torch.Tensor, grid: Grid, table: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and errors over the factor's diagonal, [run, alternatives, rows]; the sum of squares
    of the latter is what the run adds to the output error.
    """
    count = table[0].shape[0]
    work = columns[:, None].repeat(1, count, 1)
    values, scaled = torch.empty_like(work), torch.empty_like(work)
    for j in range(len(work)):
        values[j] = grid.snap(table, work[j])
        scaled[j] = (work[j] - values[j]) / upper[j, j]
        work[j + 1 :] -= upper[j, j + 1 :, None, None] * scaled[j]
    return values, scaled


def descend(values: torch.Tensor, columns: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent over values [in, rows], in place: each takes the grid value
    nearest to the one that minimises e H e^T with all others fixed.
    """
    slope = hessian @ (values - columns)
    for start, stop in _spans(0, len(values), max(BLOCK, grid.run)):
        local, own = slope[start:stop].clone(), hessian[start:stop, start:stop]
        change = torch.zeros_like(local)
        diagonal = own.diagonal().tolist()
        for first, last in _spans(start, stop, grid.run):
            table = grid.kept(first)
            for place in range(first, last):
                j = place - start
                wanted = values[place] - local[j] / diagonal[j]
                now = grid.snap(table, wanted[None])[0]
                change[j] = now - values[place]
                values[place] = now
                local += own[:, j, None] * change[j]
        slope += hessian[:, start:stop] @ change


def output_error(weight: torch.Tensor, held: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative output error sqrt(tr(E H E^T) / tr(W H W^T)), E = held - weight; weights float [out,
    in], hessian float32 [in, in], all on one device. 0 where the output is 0.
    """
    error, weight = (held - weight).float(), weight.float()
    exact = wide(error.device)
    top = float((error @ hessian).mul_(error).sum(dtype=exact))
    base = float((weight @ hessian).mul_(weight).sum(dtype=exact))
    return (max(top, 0.0) / base) ** 0.5 if base > 0 else 0.0


def parts(
    weight: torch.Tensor, shape: Curvature, rotation: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a weight as columns [in, rows] in the basis and order of solving, float32."""
    device = shape.hessian.device
    count = max(1, PART // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        piece = weight[start : start + count].to(device=device, dtype=torch.float32)
        if rotation:
            piece = rotate(piece, rotation)
        yield slice(start, start + len(piece)), piece[:, shape.order].t().contiguous()


def _w4a8(
    target: str, weight: torch.Tensor, shape: Curvature, rotation: int, run: int
) -> dict[str, torch.Tensor]:
    device = shape.hessian.device
    made = codec.encode(target, weight, device)
    made.pop(formats.DECLARATION)
    codebook = made["weight_codebook"].to(device)
    runs = _run_order(shape.order, run)
    places = torch.argsort(shape.order)
    for rows, columns in parts(weight, shape, rotation):
        channel = made["weight_s_channel"][rows].to(device)
        grid = CodebookGrid(codebook, made["weight_s_rel"][rows].to(device)[:, runs], run)
        values = solve_rows(columns / channel, shape, grid)
        made["weight"][rows] = codec.pack_nibbles(grid.codes(values)[:, places]).cpu()
        made["weight_s_rel"][rows] = grid.scales[:, torch.argsort(runs)].cpu()
    return made


def _awq(
    target: str, weight: torch.Tensor, shape: Curvature, rotation: int, run: int
) -> dict[str, torch.Tensor]:
    kind, device = formats.half(weight.dtype), shape.hessian.device

    def grid(rows: int) -> AffineGrid:
        return AffineGrid(rows, weight.shape[1], run, kind, device)

    codes, scales, zeros = solve_affine(weight, shape, grid)
    codes = codec.pack_nibbles(codes)
    return {"weight": codes, "weight_scale": scales, "weight_zeros": zeros}


def solve_affine(
    weight: torch.Tensor, shape: Curvature, make: Callable[[int], AffineGrid]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 0..15 [out, in], scales and zeros [groups, out] of a float weight [out, in], on
    the CPU. make(rows): the grid for that many rows; `shape` was prepared with its run and without
    rotation.
    """
    out, inside = weight.shape
    codes, held = torch.empty(out, inside, dtype=torch.uint8), []
    places = torch.argsort(shape.order)
    for rows, columns in parts(weight, shape, 0):
        grid = make(columns.shape[1])
        values = solve_rows(columns, shape, grid)
        codes[rows] = grid.codes(values)[:, places].cpu()
        back = torch.argsort(_run_order(shape.order, grid.run))
        held.append((grid.scales[back].cpu(), grid.zeros[back].cpu()))
    scales, zeros = (torch.cat(part, dim=1) for part in zip(*held, strict=True))
    return codes, scales, zeros


def _run_order(order: torch.Tensor, run: int) -> torch.Tensor:
    """The run at each place, int64 [runs]."""
    return order[::run] // run


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
