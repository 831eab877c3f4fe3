"""What 4 bits would save and cost in CatVTON's UNet, layer by layer at its real widths.

    python bench/catvton_w4a8.py        writes bench/results/catvton-w4a8.json

The 96 matrices of the transformer blocks (no format has 4-bit convolutions), Gaussian weights. The
error is ||W' - W|| / ||W||, which for inputs without structure is that of the layer's output too.
Bytes are those of the file, scales and declarations included.
"""

from __future__ import annotations

import json

import harness
import torch

RESULTS = harness.RESULTS / "catvton-w4a8.json"
# Blocks of each width in SD 1.5's UNet; in each: q, k, v, out, and both halves of the feed-forward.
BLOCKS = {320: 5, 640: 5, 1280: 6}


def shapes() -> dict[tuple[int, int], int]:
    """[out, in] of every matrix -> how many there are."""
    found: dict[tuple[int, int], int] = {}
    for width, blocks in BLOCKS.items():
        for shape, each in (
            ((width, width), 4),
            ((8 * width, width), 1),
            ((width, 4 * width), 1),
        ):
            found[shape] = found.get(shape, 0) + blocks * each
    return found


def main() -> None:
    harness.enter("none")
    from frugal.kernels.formats import codec, table

    torch.manual_seed(0)
    targets = (table.INT8, table.W4A8, table.W4A8_G64)
    rows, total = [], {target: {"bytes": 0, "squared": 0.0, "norm": 0.0} for target in targets}
    for shape, count in shapes().items():
        weight = torch.randn(shape)
        row = {"shape": list(shape), "count": count, "error": {}}
        for target in targets:
            made = codec.encode(target, weight, "cpu")
            lost = (codec.decode(target, made, None, shape) - weight).square().sum().item()
            norm = weight.square().sum().item()
            row["error"][target] = round((lost / norm) ** 0.5, 5)
            total[target]["bytes"] += count * table.stored_bytes(target, shape)
            total[target]["squared"] += count * lost
            total[target]["norm"] += count * norm
        rows.append(row)
        print(row, flush=True)
    report = {
        "commit": harness.commit(),
        "torch": torch.__version__,
        "device": "cpu",
        "matrices": sum(shapes().values()),
        "weights": sum(out * inside * count for (out, inside), count in shapes().items()),
        "all": {
            target: {
                "megabytes": round(sums["bytes"] / 1e6, 1),
                "error": round((sums["squared"] / sums["norm"]) ** 0.5, 5),
            }
            for target, sums in total.items()
        },
        "layers": rows,
    }
    harness.write(RESULTS, report)
    print(json.dumps(report["all"], indent=1))


if __name__ == "__main__":
    main()
