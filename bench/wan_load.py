"""What loading a large Wan file costs: memory of its own and seconds, this pack beside ComfyUI.

`python bench/wan_load.py RESULTS.json TREE [TREE ...]` writes one synthetic checkpoint per layout
(width 5120, 3 blocks: 2.6 GB in fp16) into a temporary folder, then loads each in a fresh process
per tree and loader. Memory is RssAnon, pages that belong to the process and to no file, as a share
of the file; the peak is the highest value seen by a thread that looks every 5 ms. Files are in the
page cache, so seconds say what a loader adds to reading. `digest` is a hash of every weight that
arrived: a model in two parts must give that of the single file.

It runs on a CPU, for which ComfyUI turns everything into fp32; so it is told that fp16 is good, as
it finds on NVIDIA cards from Turing on, and then picks the types that it picks there. Its dynamic
loading (newer versions, NVIDIA only) is off: the figures are those of its static loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import harness

BLOCKS = 3
TURNS = 3
# Layouts that ComfyUI's own loader reads rightly in both versions are measured with it too.
NATIVE = ("fp16", "bf16", "fp8 per tensor")
PARTS = "fp16, two parts"
LAYOUTS = (*NATIVE, PARTS, "fp8 per row", "GPTQ 4 bits", "AWQ 4 bits")
# W4A8 is left out: comfy-kitchen's quantiser takes over ten minutes of a CPU for these weights.
QUANTISED = ("fp8 per-channel", "int8 ConvRot")
AS_STORED, DEFAULT = "as stored", "default"
# Seconds after which a load counts as hung.
LIMIT = 600


def write_all(folder: Path) -> dict[str, list[str]]:
    """Layout -> its files, the first of which is what a loader gets."""
    harness.enter("none")
    import torch

    from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters
    from frugal.tests.helpers import wan as bed

    config = WanConfig(dim=5120, ffn_dim=13824, layers=BLOCKS, in_dim=16, out_dim=16)
    table = parameters(config)
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))

    def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.to(dtype).repeat(-(-count // noise.numel()))[:count].reshape(shape)

    plain = {name: filled(entry.shape, torch.float16) for name, entry in table.items()}
    layers = [n.removesuffix(".weight") for n, e in table.items() if e.linear and "blocks." in n]

    def changed(make: Callable[[int, int], dict[str, torch.Tensor]]) -> bed.Weights:
        held = dict(plain)
        for layer in layers:
            rows, width = held.pop(f"{layer}.weight").shape
            held |= {f"{layer}.{suffix}": value for suffix, value in make(rows, width).items()}
        return held

    def fp8(scale: Callable[[int], torch.Tensor]) -> bed.Weights:
        def make(rows: int, width: int) -> bed.Weights:
            weight = filled((rows, width), torch.float8_e4m3fn)
            return {"weight": weight, "weight_scale": scale(rows)}

        return changed(make)

    def packed(awq: bool) -> bed.Weights:
        def make(rows: int, width: int) -> bed.Weights:
            words = (width, rows // 8) if awq else (width // 8, rows)
            return {
                "qweight": filled(words, torch.float32).view(torch.int32),
                "qzeros": torch.full((width // 128, rows // 8), 0x77777777, dtype=torch.int32),
                "scales": filled((width // 128, rows), torch.float16),
            }

        return changed(make)

    entries = {layer: {"format": "float8_e4m3fn"} for layer in layers}
    native = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": entries})}
    makers: dict[str, Callable[[], tuple[bed.Weights, dict[str, str] | None]]] = {
        "fp16": lambda: (plain, None),
        "bf16": lambda: ({name: tensor.bfloat16() for name, tensor in plain.items()}, None),
        "fp8 per tensor": lambda: (fp8(lambda rows: torch.tensor(0.5)), native),
        "fp8 per row": lambda: (fp8(lambda rows: torch.full((rows, 1), 0.5)), None),
        "GPTQ 4 bits": lambda: (packed(awq=False), None),
        "AWQ 4 bits": lambda: (packed(awq=True), None),
    }
    files = {}
    for label, make in makers.items():
        path = folder / f"{label}.safetensors"
        tensors, metadata = make()
        bed.write(path, tensors, metadata)
        files[label] = [str(path)]
    index = bed.split(folder, plain)
    files[PARTS] = [str(index), *map(str, sorted(folder.glob("m-*.safetensors")))]
    return files


def own_memory() -> int:
    """RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def digest(model) -> str:
    """A hash over the bytes of all parameters as they are held."""
    import torch

    found = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        held = getattr(parameter, "_qdata", parameter).detach().contiguous()
        found.update(name.encode())
        found.update(held.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def load_once(tree: str, who: str, path: str, quantize: str, weight_dtype: str) -> dict:
    """Load one file in this process."""
    harness.enter(tree)
    import logging

    import comfy.model_management
    import comfy.sd
    import torch

    from frugal.nodes.wan import load_run

    comfy.model_management.should_use_fp16 = lambda *_, **__: True
    logging.disable(logging.CRITICAL)
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], own_memory())

    with torch.inference_mode():
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            before, started = own_memory(), time.perf_counter()
            if who == "native":
                patcher = comfy.sd.load_diffusion_model(path)
            else:
                patcher = load_run.load_wan(Path(path), weight_dtype, quantize)[0]
            seconds, after = time.perf_counter() - started, own_memory()
        finally:
            # A refusal must end the process: it waits for its threads.
            done.set()
            watcher.join()
    return {
        "seconds": round(seconds, 3),
        "added": after - before,
        "peak": max(highest[0], after) - before,
        "model_size": int(patcher.model_size()),
        "dtype": str(patcher.model.get_dtype()),
        "digest": digest(patcher.model.diffusion_model),
    }


def child(tree: str, who: str, path: str, quantize: str, weight_dtype: str) -> dict:
    command = [sys.executable, __file__, "--load", tree, who, path, quantize, weight_dtype]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"not loaded after {LIMIT} s"}
    if run.returncode:
        return {"error": run.stderr.strip().splitlines()[-1][:300]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def fastest(results: list[dict]) -> dict:
    """The run with the fewest seconds, with the median of all and their highest memory; an error if
    there is one.
    """
    for result in results:
        if "error" in result:
            return result
    all_of = {key: [result[key] for result in results] for key in ("seconds", "added", "peak")}
    return min(results, key=lambda result: result["seconds"]) | {
        "median_seconds": statistics.median(all_of["seconds"]),
        "added": max(all_of["added"]),
        "peak": max(all_of["peak"]),
    }


def read_through(path: str) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def measure(out: Path, trees: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--write", name]
        written = subprocess.run(command, capture_output=True, text=True, check=True)
        files = json.loads(written.stdout.strip().splitlines()[-1])
        jobs = [(label, AS_STORED, DEFAULT) for label in LAYOUTS]
        # ComfyUI turns bf16 into fp16; kept as it is, it needs no memory of its own.
        jobs += [("bf16", AS_STORED, "bf16")] + [("fp16", q, DEFAULT) for q in QUANTISED]
        for tree in trees:
            for label, quantize, weight_dtype in jobs:
                parts = files[label][1:] or files[label]
                size = sum(os.path.getsize(path) for path in parts)
                for path in parts:
                    read_through(path)
                compared = label in NATIVE and (quantize, weight_dtype) == (AS_STORED, DEFAULT)
                whos = ("native", "pack") if compared else ("pack",)
                # Turn about, and the fastest counts: other work on the machine only adds.
                turns = [who for _ in range(TURNS if compared else 1) for who in whos]
                given = (files[label][0], quantize, weight_dtype)
                runs = [(who, child(tree, who, *given)) for who in turns]
                for who in whos:
                    found = fastest([result for by, result in runs if by == who])
                    row = {"tree": Path(tree).name, "layout": label, "loader": who}
                    row |= {
                        "quantize": quantize,
                        "weight_dtype": weight_dtype,
                        "file": size,
                        **found,
                    }
                    if "added" in found:
                        row["added_percent"] = round(100 * found["added"] / size, 2)
                        row["peak_percent"] = round(100 * found["peak"] / size, 2)
                    rows.append(row)
                    print(row, flush=True)
    import torch

    result = {
        "commit": harness.commit(),
        "torch": torch.__version__,
        "device": "cpu",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "blocks": BLOCKS,
        "turns": TURNS,
        "rows": rows,
    }
    harness.write(out, result)


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        print(json.dumps(load_once(*sys.argv[2:])))
    elif sys.argv[1] == "--write":
        print(json.dumps(write_all(Path(sys.argv[2]))))
    else:
        measure(Path(sys.argv[1]), sys.argv[2:])
