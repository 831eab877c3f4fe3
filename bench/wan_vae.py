"""Wan VAE in pieces beside ComfyUI's own decode: same frames, memory by length, seconds.

`python bench/wan_vae.py RESULTS.json TREE [TREE ...]`. The VAE has the structure of Wan 2.1's and
few channels, with seeded weights; it runs on the CPU.

equal: of clips of one latent pixel (8 x 8), 1 to 41 latents long in fp32 and eleven of these
lengths in bf16, how many are ComfyUI's own to the bit. rows: one fresh process each, 32 x 32
pixels, fp32. Memory is RssAnon, pages that belong to the process, seen every 5 ms, above what it
was after a clip of 5 latents; the allocator is told to return freed memory at once. who: 'core' is
VAE.decode, 'images' FrugalWanDecode, 'file' FrugalWanDecodeToFile (H.264). image_bytes: the IMAGE,
which 'core' and 'images' return.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness

SIDE = 4
# (who, latents): 81 frames by all three, 2001 frames to the file.
JOBS = (("file", 21), ("images", 21), ("core", 21), ("file", 501))
EQUAL = {"float32": range(1, 42), "bfloat16": (*range(1, 10), 20, 41)}
# Without this, freed memory stays with the process and RssAnon wanders by tens of MB.
RETURN_FREED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
LIMIT = 1500


def tiny_vae(dtype):
    import comfy.sd
    import torch

    from frugal.demo.tiny_wan import fill, vae_shapes

    return comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=dtype)


def latent(frames: int, side: int) -> dict:
    import torch

    make = torch.Generator().manual_seed(frames)
    return {"samples": torch.randn(1, 16, frames, side, side, generator=make)}


def equal(tree: str, kind: str) -> dict:
    harness.enter(tree)
    import torch

    from frugal.nodes.vae import decode_run

    vae = tiny_vae(getattr(torch, kind))
    same = []
    with torch.inference_mode():
        for frames in EQUAL[kind]:
            given = latent(frames, 1)
            images, _ = decode_run.to_images(vae, given, 0, 0)
            same.append(torch.equal(images, vae.decode(given["samples"])[0]))
    return {"dtype": kind, "clips": len(same), "equal": sum(same)}


def own_memory() -> int:
    """RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def decode(tree: str, who: str, frames: str) -> dict:
    """Decode one clip in this process."""
    harness.enter(tree)
    import folder_paths
    import torch

    from frugal.nodes.vae import decode_run

    vae = tiny_vae(torch.float32)
    highest, done = [0], threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_input_directory(folder)

        def run(given: dict):
            if who == "core":
                return vae.decode(given["samples"])
            if who == "images":
                return decode_run.to_images(vae, given, 0, 0)
            return decode_run.to_files(vae, given, "a", 16.0, "MP4 (H.264)", "good", 0, 0, {})

        def watch() -> None:
            while not done.wait(0.005):
                highest[0] = max(highest[0], own_memory())

        with torch.inference_mode():
            run(latent(5, SIDE))
            given = latent(int(frames), SIDE)
            before = own_memory()
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                started, used = time.perf_counter(), time.process_time()
                made = run(given)
                seconds, cpu = time.perf_counter() - started, time.process_time() - used
            finally:
                done.set()
                watcher.join()
            del made
    count = 4 * int(frames) - 3
    return {
        "who": who,
        "frames": count,
        "added_peak": highest[0] - before,
        "image_bytes": count * (8 * SIDE) ** 2 * 3 * 4,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
    }


def child(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **RETURN_FREED}
    )
    if run.returncode:
        raise SystemExit(run.stderr[-2000:])
    return json.loads(run.stdout.strip().splitlines()[-1])


def measure(out: Path, trees: list[str]) -> None:
    same, rows = [], []
    for tree in trees:
        for who, frames in JOBS:
            rows.append({"tree": Path(tree).name, **child("--decode", tree, who, str(frames))})
            print(rows[-1], flush=True)
        for kind in EQUAL:
            same.append({"tree": Path(tree).name, **child("--equal", tree, kind)})
            print(same[-1], flush=True)
        write(out, same, rows)


def write(out: Path, same: list[dict], rows: list[dict]) -> None:
    import torch

    result = {
        "commit": harness.commit(),
        "torch": torch.__version__,
        "device": "cpu",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "equal": same,
        "rows": rows,
    }
    harness.write(out, result)


if __name__ == "__main__":
    if sys.argv[1] == "--equal":
        print(json.dumps(equal(*sys.argv[2:])))
    elif sys.argv[1] == "--decode":
        print(json.dumps(decode(*sys.argv[2:])))
    else:
        measure(Path(sys.argv[1]), sys.argv[2:])
