"""What converting a large Wan file costs: memory of its own, and bytes per second.

`python bench/quantize.py RESULTS.json [FORMAT ...]` writes a synthetic bf16 checkpoint (width 5120,
8 blocks: 6.1 GB; 1 block: 1.2 GB) into a temporary folder (FRUGAL_BENCH_FOLDER chooses its disk)
and converts it in a fresh process per run. Memory is RssAnon, pages that belong to the process and
to no file, above what it was before the conversion; the peak is the highest value seen by a thread
that looks every 5 ms. Beside it, in fresh processes too:

- in memory: the whole file read with safetensors, the same rounding, the whole result written with
  safetensors and brought to disk;
- rounding: only the same rounding, of tensors that are in memory, nothing written;
- copy: the source's bytes copied into a new file and brought to disk.

Speeds are bytes of the source per second of wall time, the best of FRUGAL_BENCH_TURNS turns (2).
Seconds of the processors are given too: other work on the machine changes them less.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness

TURNS = int(os.environ.get("FRUGAL_BENCH_TURNS", "2"))
WHOS = ("stream", "in memory", "rounding", "copy")
# Format -> blocks of the file: the slow rounding of 4 bits is measured on a smaller file, whose
# layers have the same size.
FORMATS = {"int8 ConvRot": 8, "fp8": 8, "W4A8": 1, "AWQ W4A16": 1}


def write_source(path: Path, blocks: int) -> None:
    """A Wan checkpoint of the released width, noise repeated, written with little memory."""
    harness.enter("none")
    import torch

    from frugal.kernels.checkpoints.header import TensorInfo
    from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters
    from frugal.kernels.quantize.writer import arranged, header_bytes

    config = WanConfig(dim=5120, ffn_dim=13824, layers=blocks, in_dim=16, out_dim=16)
    table = parameters(config)
    groups = arranged({n: TensorInfo(torch.bfloat16, p.shape)} for n, p in table.items())
    noise = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(1))
    data = noise.bfloat16().view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(header_bytes(groups, {}))
        left = sum(info.nbytes for group in groups for info in group.values())
        while left:
            left -= file.write(data[: min(left, len(data))])


def own_memory() -> int:
    """RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def once(who: str, source: str, target: str, out: str) -> dict:
    """One run in this process."""
    harness.enter("none")
    import torch
    from safetensors.torch import load_file, save_file

    from frugal.kernels.formats import codec
    from frugal.kernels.quantize.convert import convert, uniform
    from frugal.kernels.quantize.weights import Weights

    codec.encode(target, torch.randn(64, 256), "cpu")
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], own_memory())

    def to_disk() -> None:
        with open(out, "r+b") as file:
            os.fsync(file.fileno())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, started, used = own_memory(), time.perf_counter(), time.process_time()
    if who == "stream":
        held = Weights(source)
        convert(held, Path(out), uniform(held, target))
    elif who == "copy":
        with open(source, "rb") as a, open(out, "wb") as b:
            shutil.copyfileobj(a, b, 1 << 24)
        to_disk()
    else:
        tensors = load_file(source)
        made, rounding = {}, [0.0, 0.0]
        large = set(uniform(Weights(source), target))
        for name in list(tensors):
            layer, tensor = name.removesuffix(".weight"), tensors.pop(name)
            if layer not in large or not name.endswith(".weight"):
                made[name] = tensor
                continue
            tensor = tensor.clone() if who == "rounding" else tensor
            clocks = [time.perf_counter(), time.process_time()]
            parts = codec.encode(target, tensor, "cpu")
            rounding[0] += time.perf_counter() - clocks[0]
            rounding[1] += time.process_time() - clocks[1]
            if who == "in memory":
                made.update({f"{layer}.{suffix}": part for suffix, part in parts.items()})
        if who == "in memory":
            save_file(made, out)
            to_disk()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    if who == "rounding":
        seconds, used = rounding
    done.set()
    watcher.join()
    size = os.path.getsize(source)
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(used, 2),
        "MB_per_s": round(size / seconds / 1e6, 1),
        "peak_anonymous_MB": round((highest[0] - before) / 1e6, 1),
        "written": os.path.getsize(out) if os.path.exists(out) else 0,
    }


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def measure(results: Path, targets: list[str]) -> None:
    rows = []
    place = os.environ.get("FRUGAL_BENCH_FOLDER")
    with tempfile.TemporaryDirectory(dir=place) as name:
        source, out = Path(name) / "wan.safetensors", Path(name) / "out.safetensors"
        for target in targets:
            command = [sys.executable, __file__, "--write", str(source)]
            subprocess.run([*command, str(FORMATS[target])], check=True)
            found: dict[str, list[dict]] = {who: [] for who in WHOS}
            for _ in range(TURNS):
                for who in WHOS:
                    read_through(source)
                    command = [sys.executable, __file__, "--once", who, str(source)]
                    run = subprocess.run([*command, target, str(out)], capture_output=True)
                    if run.returncode:
                        sys.exit(run.stderr.decode()[-2000:])
                    found[who].append(json.loads(run.stdout.splitlines()[-1]))
                    out.unlink(missing_ok=True)
            row: dict = {"format": target, "blocks": FORMATS[target]}
            row["source_bytes"] = source.stat().st_size
            for who, runs in found.items():
                best = min(runs, key=lambda run: run["seconds"])
                peak = max(run["peak_anonymous_MB"] for run in runs)
                row[who] = {**best, "peak_anonymous_MB": peak}
            speed = row["stream"]["MB_per_s"]
            row["speed_of_in_memory"] = round(speed / row["in memory"]["MB_per_s"], 3)
            both = row["copy"]["seconds"] + row["rounding"]["seconds"]
            row["speed_of_copy_and_rounding"] = round(both / row["stream"]["seconds"], 3)
            spent = {who: row[who]["processor_seconds"] for who in WHOS}
            row["processor_share_of_in_memory"] = round(spent["stream"] / spent["in memory"], 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
            save(results, rows)


def save(results: Path, rows: list[dict]) -> None:
    import torch

    about = {
        "torch": torch.__version__,
        "device": "cpu",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "commit": harness.commit(),
    }
    harness.write(results, {**about, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write_source(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "--once":
        print(json.dumps(once(*sys.argv[2:])))
    else:
        measure(Path(sys.argv[1]), sys.argv[2:] or list(FORMATS))
