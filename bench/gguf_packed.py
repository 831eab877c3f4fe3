"""GGUF kept packed: memory and time of a forward beside a bf16 file and beside expanded blocks.

`python bench/gguf_packed.py TREE RESULT.json [FOLDER]`, then `--table RESULT.json`; FOLDER holds
the files of an earlier `--write FOLDER`. A Wan of width 5120 with
one block, random weights, one latent frame of 480x832 (1560 tokens), on the CPU; each contender in
a process of its own, the least of two forwards. Seconds are of the processor, all threads
together, so that other work on the machine counts little, and shown as a ratio to the bf16 file,
whose layers are cast to the compute type as packed ones are unpacked to it. Unpacking does not
depend on the tokens: a video has more, and a smaller ratio. Memory is what the model holds as
ComfyUI counts it, and RssAnon added by loading, pages that belong to no file.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q2_K")
BF16, EXPANDED = "bf16 file", "Q4_K, expanded to bf16"
FRAME, TURNS = (1, 60, 104), 2


def write_all(folder: Path) -> None:
    harness.enter("none")
    import torch

    from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters
    from frugal.tests.helpers import gguf
    from frugal.tests.helpers import wan as bed

    config = WanConfig(dim=5120, ffn_dim=13824, layers=1, in_dim=16, out_dim=16)
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    source = {}
    for name, entry in parameters(config).items():
        count = torch.Size(entry.shape).numel()
        source[name] = noise.repeat(-(-count // noise.numel()))[:count].reshape(entry.shape)
    bed.write(folder / "bf16.safetensors", {name: t.bfloat16() for name, t in source.items()})
    for kind in KINDS:
        gguf.write(folder / f"{kind}.gguf", source, kind, config, others="BF16")


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def one(tree: str, path: Path, weight_dtype: str) -> dict:
    harness.enter(tree)
    import torch

    from frugal.nodes.wan import load_run

    logging.disable(logging.CRITICAL)
    make = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        before, started = own_memory(), time.perf_counter()
        patcher = load_run.load_wan(path, weight_dtype)[0]
        loaded, added = time.perf_counter() - started, own_memory() - before
        x = torch.randn(1, 16, *FRAME, generator=make)
        context = torch.randn(1, 64, 4096, generator=make)
        seconds = []
        for _ in range(TURNS):
            began = time.process_time()
            patcher.model.diffusion_model(x, torch.tensor([600.0]), context)
            seconds.append(time.process_time() - began)
    return {
        "file": path.stat().st_size,
        "held": int(patcher.model_size()),
        "added": added,
        "load_seconds": loaded,
        "seconds": min(seconds),
    }


def measure(tree: str, out: Path, written: str = "") -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(written or name)
        if not written:
            subprocess.run([sys.executable, __file__, "--write", name], check=True)
        contenders = {BF16: ("bf16.safetensors", "bf16"), EXPANDED: ("Q4_K.gguf", "bf16")}
        contenders |= {f"{kind}, packed": (f"{kind}.gguf", "default") for kind in KINDS}
        for label, (file, dtype) in contenders.items():
            command = [sys.executable, __file__, "--one", tree, str(folder / file), dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[label] = json.loads(done.stdout.splitlines()[-1])
            rows[label]["ratio"] = rows[label]["seconds"] / rows[BF16]["seconds"]
            rows[label]["held_share"] = rows[label]["held"] / rows[label]["file"]
            print(label, rows[label], flush=True)
    import torch

    place = harness.place(tree, torch.device("cpu"))
    harness.write(out, {**place, "tokens": FRAME[0] * FRAME[1] * FRAME[2] // 4, "rows": rows})


def table(file: str) -> str:
    result = json.loads(Path(file).read_text("utf-8"))
    lines = ["| file | MB | held | of the file | forward, bf16 = 1 |", "|---|---|---|---|---|"]
    for label, row in result["rows"].items():
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("file", "held"))
        cells = (*sizes, f"{row['held_share']:.2f}", f"{row['ratio']:.2f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(sys.argv[2]))
    elif sys.argv[1] == "--write":
        write_all(Path(sys.argv[2]))
    elif sys.argv[1] == "--one":
        print(json.dumps(one(sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
    else:
        measure(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
