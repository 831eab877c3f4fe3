"""What the converter predicts of a model's error, and what it is on prompts that it never saw.

    python bench/budget.py            writes bench/results/budget.json

Tiny random Wan models inside ComfyUI (FRUGAL_COMFYUI_TREE, as for the tests), which needs
comfy-kitchen. Each is recorded while it samples from one or more prompts, as FrugalCalibrate does
with measure_layers; every layer is encoded with these statistics; and the error of whole models in
one format or in a mix is predicted as the budget does. `as recorded` predicts with the second
moments as they are, `shrunk` with those of kernels/quantize/shrinkage.py. The truth is the rel-L2
of the model's output at the kept calls of other runs: other prompts, other noise.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import harness

RESULTS = harness.RESULTS / "budget.json"
# (seed of the model, prompts recorded, steps)
CASES = [(6, 1, 4), (6, 1, 20), (16, 1, 8), (16, 4, 8)]
OTHERS = (501, 502, 503)


def case(seed: int, prompts: int, steps: int, folder: Path) -> list[dict]:
    from frugal.kernels.formats import codec, table
    from frugal.kernels.quantize.budget import frontier
    from frugal.kernels.quantize.calibration import from_hessian, read_calibration
    from frugal.kernels.quantize.curves import LayerCurve, stored_error
    from frugal.kernels.quantize.sensitivity import for_outputs
    from frugal.tests.helpers.budget import TARGETS, Bench

    bench = Bench(seed)
    mine, other = folder / "mine.safetensors", folder / "other.safetensors"
    bench.run(mine, range(100, 100 + prompts), 1, steps, shares=True)
    bench.run(other, OTHERS, 2, 8, shares=False)
    known = read_calibration(mine)
    bench.statistics = known.layer
    judged = {"as recorded": {}, "shrunk": {}}
    for name in bench.layers:
        statistics, weight = known.layer(name), bench.weights[name]
        made = {target: bench.tensors(name, target) for target in TARGETS}
        options = {target: table.options(target, tuple(weight.shape)) for target in TARGETS}
        for target in TARGETS:
            bench.decoded[name, target] = codec.decode(
                target, made[target], options[target], tuple(weight.shape)
            )
        hessian = statistics.hessian()
        for way, rows in (("as recorded", 0), ("shrunk", statistics.independent)):
            held = from_hessian(name, hessian, rows)
            found = {
                target: stored_error(name, target, weight, made[target], options[target], held)
                for target in TARGETS
            }
            energy = float(weight.double().square().sum())
            signal = next(iter(found.values())).signal
            white = energy * float(hessian.diagonal().double().mean()) / signal
            judged[way][name] = LayerCurve(name, tuple(weight.shape), found, {}, True, white)
    shares = {way: for_outputs(known.shares.layers, curves) for way, curves in judged.items()}
    swept = frontier(judged["shrunk"], 0, importance=shares["shrunk"])
    choices = {target: dict.fromkeys(bench.layers, target) for target in TARGETS[1:]}
    size = (bench.bytes(choices[table.INT8]) + bench.bytes(choices[table.W4A8])) // 2
    choices["by the budget"] = dict(swept.at(size).choice)

    def predicted(way: str, choice: dict[str, str]) -> float:
        errors = (
            shares[way][name] * judged[way][name].formats[target].relative ** 2
            for name, target in choice.items()
        )
        return math.sqrt(math.fsum(errors))

    calls = {"own": known.calls(), "other": read_calibration(other).calls()}
    rows = []
    for label, choice in choices.items():
        row: dict = {"model": seed, "prompts": prompts, "steps": steps, "formats": label}
        for which, held in calls.items():
            bench.use(held)
            row[which] = round(bench.error(choice), 5)
        for way in judged:
            row[way] = round(predicted(way, choice), 5)
            row[f"other / {way}"] = round(row["other"] / row[way], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    harness.enter()
    import torch

    rows = []
    for given in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows += case(*given, Path(folder))
    spread = {
        way: [min(ratios), max(ratios)]
        for way in ("as recorded", "shrunk")
        for ratios in [[row[f"other / {way}"] for row in rows]]
    }
    about = {"device": "cpu", "torch": torch.__version__, "commit": harness.commit()}
    harness.write(RESULTS, {**about, "other / predicted": spread, "rows": rows})
    print(json.dumps(spread))


if __name__ == "__main__":
    main()
