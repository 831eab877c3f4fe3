"""Wan with and without its cross-attention cache: weights read per step, bytes kept, step time.

`python bench/wan_context.py TREE RESULT.json` for each ComfyUI, then `python bench/wan_context.py
--table RESULT.json ...`. Random-weight Wan models of the 1.3B and 14B proportions (hidden 5.83 and
2.7 times the width) and a prompt of 40 tokens padded to 512 are sampled by euler with guidance.
Weights are counted by the memory that any operation touches; seconds are the median of steps 2 to
the last, in turns, on this CPU. They say that keeping costs no time, and nothing of what a user
gains: nothing is streamed here, and a video of 32 tokens beside a text of 512 makes the computing
that is saved a far larger share of a step than it is of a real one.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

TURNS, WORDS, ROWS = 3, 40, 512
WAYS = ("stock", "kept", "kept in fp8")


def measure(tree: Path, out: Path) -> None:
    harness.enter(tree)
    import torch

    from frugal.kernels.checkpoints.wan_shapes import WanConfig

    logging.disable(logging.CRITICAL)
    configs = {
        "T2V, 1.3B proportions": WanConfig(dim=384, ffn_dim=2240, layers=2, in_dim=16, out_dim=16),
        "T2V, 14B proportions": WanConfig(dim=640, ffn_dim=1728, layers=2, in_dim=16, out_dim=16),
        "I2V, 14B proportions": WanConfig(
            dim=640, ffn_dim=1728, layers=2, in_dim=36, out_dim=16, image=True
        ),
    }
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, config in configs.items():
            rows[label] = row(config, Path(folder))
            print(label, json.dumps(rows[label]), flush=True)
    result = {
        "tree": tree.name,
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    harness.write(out, result)


def row(config, folder: Path) -> dict:
    import torch

    from frugal.nodes.memory import cross_kv_run
    from frugal.nodes.wan import load_run
    from frugal.tests.helpers import cross_kv as runs
    from frugal.tests.helpers import wan as bed

    runs.ROWS = ROWS
    path = bed.write(folder / "wan.safetensors", bed.base(bed.weights(config), torch.float32)[0])
    with torch.inference_mode():
        stock = load_run.load_wan(path, "fp32")[0]
    prompts = [
        [[runs.text(seed, WORDS), dict(runs.image() if config.image else {})]] for seed in (5, 6)
    ]
    reports: dict[str, list] = {way: [] for way in WAYS[1:]}
    models = {"stock": stock}
    for way, fp8 in zip(WAYS[1:], (False, True), strict=True):
        options = cross_kv_run.Options(fp8=fp8)
        models[way], plan = cross_kv_run.apply(stock, options, reports[way].append)
    latents = {way: runs.sample(model, prompts) for way, model in models.items()}
    found: dict = {
        "share of block weights": plan.share,
        "weight bytes": plan.weight_bytes,
        "block bytes": plan.block_bytes,
    }
    blocks = sum(
        weight.nbytes
        for name, weight in stock.model.diffusion_model.named_parameters()
        if name.startswith("blocks.")
    )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(TURNS):
        for way, model in models.items():
            seconds[way] += steps(model, prompts)
    for way, model in models.items():
        touched = runs.touched_bytes(model, prompts)
        found[way] = {
            "bytes read, first step": touched[0],
            "bytes read, later steps": touched[-1],
            "seconds per step": statistics.median(seconds[way]),
            "error": bed.relative(latents[way], latents["stock"]),
        }
        if way != "stock":
            spared = found["stock"]["bytes read, later steps"] - touched[-1]
            found[way]["share no longer read"] = spared / blocks
            found[way]["bytes kept"] = reports[way][-1].bytes
            ratio = found[way]["seconds per step"] / found["stock"]["seconds per step"]
            found[way]["ratio"] = ratio
    return found


def steps(model, prompts) -> list[float]:
    """Seconds of every step but the first."""
    from frugal.tests.helpers import cross_kv as runs

    marks: list[float] = []
    runs.sample(model, prompts, lambda *_: marks.append(time.perf_counter()))
    return [after - before for before, after in itertools.pairwise(marks)]


def table(*files: str) -> str:
    lines = [
        "| ComfyUI | model | block weights no longer read | kept | kept in fp8 | error in fp8 | "
        "step time, kept | step time, fp8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in files:
        result = json.loads(Path(file).read_text("utf-8"))
        version = result["tree"].rpartition("-")[2]
        for label, found in result["rows"].items():
            kept, fp8 = found["kept"], found["kept in fp8"]
            lines.append(
                f"| {version} | {label} | {100 * kept['share no longer read']:.1f} % | "
                f"{kept['bytes kept'] / 1e6:.2f} MB | {fp8['bytes kept'] / 1e6:.2f} MB | "
                f"{fp8['error']:.4f} | {kept['ratio']:.2f} | {fp8['ratio']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(*sys.argv[2:]))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
