"""Output error of calibrated weights against rounding and against GGUF's formats, on synthetic
layers whose inputs are correlated and have outlier channels (tests/helpers/quantize.py).

    python bench/gptq.py            all tables, written to bench/results/gptq.json
    python bench/gptq.py formats    one of: formats, steps, few, sketch

The gguf package dequantises Q4_K and has no quantiser for it. Its place is taken by one written
here after the format's definition (8 blocks of 32 with 6-bit scales and minima, each found by a
least-squares search), without and with importance weights from the mean squares of the inputs.
Every error is ||(W' - W) x|| / ||W x|| on inputs that no solver saw.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import harness
import torch

RESULTS = harness.RESULTS / "gptq.json"
harness.enter("none")

from frugal.kernels.formats import codec, table  # noqa: E402
from frugal.kernels.quantize import gptq, grids, shrinkage  # noqa: E402
from frugal.kernels.quantize.calibration import from_hessian, statistics_of  # noqa: E402
from frugal.kernels.quantize.curves import stored_error  # noqa: E402
from frugal.kernels.quantize.moments import Gatherer  # noqa: E402
from frugal.tests.helpers.quantize import Layer, layer, output_error  # noqa: E402

SOLVED = [target for target in table.TARGETS if target != table.BF16]
SEEDS = (101, 102, 103)
PACKAGED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def held(bed: Layer, target: str, statistics=None) -> torch.Tensor:
    shape = tuple(bed.weight.shape)
    made = codec.encode(target, bed.weight, "cpu", statistics=statistics)
    return codec.decode(target, made, None, shape)


def error(bed: Layer, weight: torch.Tensor) -> float:
    return output_error(bed.weight, weight, bed.held_out)


def packaged(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, float]:
    """The weight after the gguf package's own quantiser, and bytes per weight."""
    import gguf

    which = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weight.numpy(), which)
    return torch.from_numpy(
        gguf.quants.dequantize(data, which)
    ).float(), data.nbytes / weight.numel()


def q4_k(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Q4_K by a search written here: w = d * s * q - dmin * m, q of 4 bits for each of 32 inputs, s
    and m of 6 bits for each block, d and dmin in fp16 for each 8 blocks. 4.5 bits per weight.
    """
    x = weight.reshape(-1, 8, 32)
    weights = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    if importance is not None:
        spread = x.square().mean((1, 2), keepdim=True)
        along = importance.expand_as(weight).reshape(x.shape)
        weights = along * (spread + x.square()).sqrt()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    reach = (high - low).clamp(min=1e-12)
    best = torch.full_like(low, torch.inf)
    scale, minimum = reach / 15, -low
    total = weights.sum(-1, keepdim=True)
    mean = (weights * x).sum(-1, keepdim=True)
    for step in range(-10, 31):
        q = ((x - low) * (15 + 0.1 * step) / reach).round().clamp(0, 15)
        first = (weights * q).sum(-1, keepdim=True)
        second = (weights * q * q).sum(-1, keepdim=True)
        cross = (weights * q * x).sum(-1, keepdim=True)
        det = total * second - first**2
        s = (total * cross - mean * first) / det
        m = (first * cross - second * mean) / det
        alone = cross / second
        s, m = torch.where(m < 0, alone, s), m.clamp(min=0)
        found = (weights * (s * q - m - x).square()).sum(-1, keepdim=True)
        better = (found < best) & (det > 0) & (s > 0)
        best = torch.where(better, found, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)

    def six_bits(values: torch.Tensor) -> torch.Tensor:
        unit = (values.amax(1, keepdim=True) / 63).half().float().clamp(min=1e-12)
        return (values / unit).round().clamp(0, 63) * unit

    s, m = six_bits(scale), six_bits(minimum)
    q = ((x + m) / s.clamp(min=1e-12)).round().clamp(0, 15)
    return (s * q - m).reshape(weight.shape)


def table_formats() -> dict:
    rows: dict[str, dict] = {}

    def note(name: str, size: float, found: float) -> None:
        entry = rows.setdefault(name, {"bytes_per_weight": round(size, 4), "error": []})
        entry["error"].append(round(found, 5))

    for seed in SEEDS:
        bed = layer(seed)
        statistics = statistics_of("layer", bed.seen)
        for target in SOLVED:
            size = table.stored_bytes(target, tuple(bed.weight.shape)) / bed.weight.numel()
            note(f"{target}, nearest", size, error(bed, held(bed, target)))
            started = time.perf_counter()
            note(f"{target}, calibrated", size, error(bed, held(bed, target, statistics)))
            rows[f"{target}, calibrated"]["seconds"] = round(time.perf_counter() - started, 1)
        for kind in PACKAGED:
            weight, size = packaged(bed.weight, kind)
            note(f"GGUF {kind}, gguf package", size, error(bed, weight))
        squares = bed.seen.square().mean(0)
        note("GGUF Q4_K, written here", 0.5625, error(bed, q4_k(bed.weight)))
        note("GGUF Q4_K, written here, weighted", 0.5625, error(bed, q4_k(bed.weight, squares)))
    return rows


def table_steps() -> dict:
    """What each addition to plain GPTQ gives, W4A8 and AWQ."""
    order, steps, parts, sweeps = gptq._order, grids.E4M3_STEPS, grids.RANGE_PARTS, gptq.SWEEPS
    natural: Callable = lambda diagonal, run: torch.arange(len(diagonal))  # noqa: E731
    kinds = {
        "GPTQ": (natural, (0,), (1.0,), 0),
        "and order of runs": (order, (0,), (1.0,), 0),
        "and scales on the way": (order, steps, parts, 0),
        "and descent": (order, steps, parts, sweeps),
    }
    found: dict[str, dict] = {}
    try:
        for seed in SEEDS[:2]:
            bed = layer(seed, out=384)
            for name, kind in kinds.items():
                gptq._order, grids.E4M3_STEPS, grids.RANGE_PARTS, gptq.SWEEPS = kind
                for target in (table.W4A8, table.AWQ):
                    value = error(bed, held(bed, target, statistics_of("layer", bed.seen)))
                    found.setdefault(target, {}).setdefault(name, []).append(round(value, 5))
    finally:
        gptq._order, grids.E4M3_STEPS, grids.RANGE_PARTS, gptq.SWEEPS = order, steps, parts, sweeps
    return found


def table_few() -> dict:
    """Errors over those of rounding when few inputs were seen, by rows / inputs; white inputs have
    nothing to be learnt. And the error over what is predicted of it: judged by the inputs as they
    are, and by what was solved with.
    """
    target, found = table.W4A8_G64, {}
    for kind in ("correlated", "white"):
        bed = layer(SEEDS[0], out=64, inside=512, seen=2048, held_out=1024)
        if kind == "white":
            make = torch.Generator().manual_seed(SEEDS[0])
            bed = bed._replace(
                seen=torch.randn(2048, 512, generator=make),
                held_out=torch.randn(1024, 512, generator=make),
            )
        nearest = error(bed, held(bed, target))
        for rows in (4, 16, 64, 256, 1024, 2048):
            seen = bed.seen[:rows]
            hessian = seen.t() @ seen / rows
            ways = {"as it is": 0, "shrunk": rows}
            entry = {"shrinkage": round(shrinkage.shrinkage(hessian, rows), 3)}
            for name, count in ways.items():
                weight = held(bed, target, from_hessian(f"{kind}{rows}{name}", hessian, count))
                entry[name] = round(error(bed, weight) / nearest, 3)
            for name, count in (("over seen", 0), ("over solved with", rows)):
                judged = from_hessian(f"{kind}{rows}{name}", hessian, count)
                tensors = {"weight": weight}
                told = stored_error("layer", table.BF16, bed.weight, tensors, {}, judged)
                entry[name] = round(error(bed, weight) / told.relative, 3)
            found[f"{kind}, {rows / 512:g}"] = entry
    return found


def table_sketch() -> dict:
    """Errors of W4A8 with statistics kept in fewer columns; half as many directions are stored."""
    bed = layer(SEEDS[0], out=192)
    found = {"nearest": round(error(bed, held(bed, table.W4A8)), 5)}
    for columns in (32, 128, 256, 512, 1000, 1024):
        gatherer = Gatherer(1024, columns)
        gatherer.add(bed.seen)
        moment = gatherer.moment("layer")
        statistics = from_hessian("layer", moment.dense(), moment.rows)
        found[str(columns)] = round(error(bed, held(bed, table.W4A8, statistics)), 5)
    diagonal = torch.diag(bed.seen.square().mean(0))
    found["diagonal"] = round(error(bed, held(bed, table.W4A8, from_hessian("d", diagonal))), 5)
    return found


def main() -> None:
    tables = {
        "formats": table_formats,
        "steps": table_steps,
        "few": table_few,
        "sketch": table_sketch,
    }
    chosen = sys.argv[1:] or list(tables)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result |= {"device": "CPU", "torch": torch.__version__, "commit": harness.commit()}
    for name in chosen:
        result[name] = tables[name]()
        print(name, json.dumps(result[name], indent=1), flush=True)
        harness.write(RESULTS, result)


if __name__ == "__main__":
    main()
