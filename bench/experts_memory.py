"""Resident memory of two mapped experts around their switch, on the CPU.

`python bench/experts_memory.py TREE RESULT.json` writes two random Wan files of width 1536 in bf16,
joins them and samples four steps, two with each. RssAnon are pages that belong to no file, RssFile
pages of mapped files, which the system may drop: before loading, after it, at the last step of each
expert, and after the run.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import harness

STEPS = 4


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(found[key].split()[0]) for key in ("RssAnon", "RssFile")}


def measure(tree: str, out: Path) -> None:
    harness.enter(tree)
    import comfy.sample
    import torch

    from frugal.kernels.checkpoints.wan_shapes import WanConfig
    from frugal.nodes.wan import experts_run, load_run
    from frugal.tests.helpers import wan as bed

    logging.disable(logging.CRITICAL)
    config = WanConfig(dim=1536, ffn_dim=8960, layers=8, in_dim=16, out_dim=16)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        paths = []
        for seed in (1, 2):
            tensors = {n: t.bfloat16() for n, t in bed.weights(config, seed).items()}
            paths.append(bed.write(Path(name) / f"{seed}.safetensors", tensors))
            del tensors
        rows = {"before loading": resident()}
        pair = [load_run.load_wan(path, "bf16")[0] for path in paths]
        rows["loaded"] = resident()
        model = experts_run.join(*pair, 0.9, 0.0)[0]
        noise = torch.randn(1, 16, 1, 16, 16)
        prompt = [[torch.randn(1, 64, 4096), {}]]

        def callback(step: int, *_) -> None:
            rows[f"step {step + 1} of {STEPS}"] = resident()

        comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise),
            callback=callback, disable_pbar=True, seed=1,
        )  # fmt: skip
        rows["after the run"] = resident()
        size = sum(path.stat().st_size for path in paths)
    place = harness.place(tree, torch.device("cpu"))
    harness.write(out, {**place, "files": size, "rows": rows})
    for label, row in rows.items():
        print(label, {key: f"{value / 1e6:.0f} MB" for key, value in row.items()})


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]))
