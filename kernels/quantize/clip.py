"""8-bit formats from calibration statistics: the scale that keeps the output best, then GPTQ on the
grid of that scale.

A smaller scale cuts the largest weights and makes every other step finer; which is better depends
on what the inputs do, so scales are compared by e H e^T. fp8 has one scale for the whole weight,
int8 one per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import FrugalError
from ..formats import table
from .gptq import Curvature, curvature, parts, solve_rows
from .grids import FP8_TOP, INT8_TOP, PlainGrid

if TYPE_CHECKING:
    from .calibration import LayerStatistics

INT8_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Down to half: a scale and its double give the same normal numbers of fp8.
FP8_PARTS = (1.0, 0.93, 0.87, 0.81, 0.76, 0.71, 0.66, 0.62, 0.57, 0.53)
SAMPLE_ROWS = 256


def solve(
    target: str,
    weight: torch.Tensor,
    statistics: LayerStatistics,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float weight [out, in] in formats.FP8 or INT8, without the
    declaration, on the CPU; computed on `device`. Nothing is random.

    Raises FrugalError if the statistics have another width.
    """
    settings = table.options(target, (weight.shape[0], weight.shape[1]))
    rotation = settings.get("convrot_groupsize", 0)
    shape = curvature(statistics, weight.shape[1], rotation, 1, torch.device(device))
    make = {table.FP8: _fp8, table.INT8: _int8}.get(target)
    if make is None:
        raise FrugalError(
            f"a scale search for {target}",
            f"{table.FP8} or {table.INT8}",
            "use gptq.solve for the 4-bit formats",
        )
    return make(weight, shape, rotation)


def loss(values: torch.Tensor, columns: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e H e^T of each row, float32 [rows], for values and columns [in, rows]."""
    error = values - columns
    return (error * (hessian @ error)).sum(0)


def _int8(weight: torch.Tensor, shape: Curvature, rotation: int) -> dict[str, torch.Tensor]:
    out = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32)
    places, grid = torch.argsort(shape.order), PlainGrid(float8=False)
    for rows, columns in parts(weight, shape, rotation):
        top = columns.abs().amax(0)
        first = torch.where(top > 0, top, torch.ones_like(top)) / INT8_TOP
        best, least = first, torch.full_like(first, torch.inf)
        for part in INT8_PARTS:
            scale = first * part
            value = grid.snap((), columns / scale) * scale
            found = loss(value, columns, shape.hessian)
            best = torch.where(found < least, scale, best)
            least = torch.minimum(found, least)
        values = solve_rows(columns / best, shape, grid)
        out[rows] = values.to(torch.int8)[places].t().cpu()
        scales[rows] = best[:, None].cpu()
    return {"weight": out, "weight_scale": scales}


def _fp8(weight: torch.Tensor, shape: Curvature, rotation: int) -> dict[str, torch.Tensor]:
    grid, places = PlainGrid(float8=True), torch.argsort(shape.order)
    # As it is stored, so that codes are chosen against what a reader multiplies by.
    stored = torch.tensor(_fp8_scale(weight, shape, grid), dtype=torch.float32)
    scale = float(stored)
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for rows, columns in parts(weight, shape, rotation):
        values = solve_rows(columns / scale, shape, grid)
        out[rows] = values[places].t().to(torch.float8_e4m3fn).cpu()
    return {"weight": out, "weight_scale": stored}


def _fp8_scale(weight: torch.Tensor, shape: Curvature, grid: PlainGrid) -> float:
    """The best scale among FP8_PARTS of the one that cuts nothing, judged on evenly spread rows and
    those with the largest weight.
    """
    tops = weight.abs().amax(1).float()
    first = float(tops.max()) / FP8_TOP
    if not first > 0:
        return 1.0
    chosen = torch.cat(
        [
            torch.linspace(0, len(tops) - 1, min(SAMPLE_ROWS, len(tops))).long(),
            tops.cpu().topk(min(SAMPLE_ROWS, len(tops))).indices,
        ]
    ).unique()
    sample = weight[chosen.to(weight.device)]
    columns = torch.cat([piece for _, piece in parts(sample, shape, 0)], dim=1)
    found = [
        float(loss(grid.snap((), columns / scale) * scale, columns, shape.hessian).sum())
        for scale in (first * part for part in FP8_PARTS)
    ]
    return first * FP8_PARTS[min(range(len(found)), key=found.__getitem__)]
