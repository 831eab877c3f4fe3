"""Mask kernels against OpenCV, ComfyUI's and KJNodes' ways, interleaved in one run.

    python bench/masks.py [--rounds 15] [--minutes 6] [--only clip,...] [--note "..."]

ComfyUI's own nodes come from the folder FRUGAL_COMFYUI_TREE, or the oldest one that dev.py has
installed; without any they are left out.

Chain: threshold 0.5, fill all holes, drop islands below 200 px, grow 16 px (disk), feather 12 px.
Every contender gets two threads and returns a new array, of memory that the process has held
before: glibc is told to give none back. Else a result costs what the system asks for its pages, and
on a virtual machine whose host takes free pages back that is from a third to seven times the work,
by chance and for ours and theirs alike. Each round runs all of them once, in an
order of its own; the figures are medians over rounds, and the ratio is the median of the rounds'
ratios of process CPU time, which other load on the machine disturbs least. A case stops early,
after 3 rounds at least, when its share of the time is used. What we lose is in the list too. Writes
bench/results/masks-CPU.json, CPU being LLVM's name of the processor, so that the files of several
machines lie side by side; cases that --only leaves out stay in it if they are of the same commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import harness
import llvmlite.binding
import numba
import numpy as np
import scipy
import torch

THREADS = 2
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
FIRST_CALL = """
import importlib.util, sys, time, numpy as np
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "frugal", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["frugal"] = importlib.util.module_from_spec(spec)
from frugal.kernels.masks.refine import RefineSettings, refine
chosen = RefineSettings(fill_holes=-1, drop_islands=200, grow=16, feather=12)
began = time.perf_counter()
refine(np.zeros((1, 64, 64), np.float32), chosen)
print(time.perf_counter() - began)
"""


def keep_memory() -> None:
    """Start anew with KEPT, which glibc reads when a process begins."""
    if sys.platform == "linux" and not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | KEPT)


def enter() -> str | None:
    """Make the pack importable as `frugal`, with a ComfyUI beside it; its folder's name."""
    tree = harness.enter().TREE
    return tree.name if tree else None


# Chain contenders are different by construction: contour areas, their box widths' Gaussian, where
# E's and F's ramp starts. Above this mean difference they would not do the same work.
LARGEST_MEAN_DIFFERENCE = {
    "opencv A": 1e-3,
    "opencv C": 0.01,
    "opencv E": 0.01,
    "opencv F": 0.01,
    "core grow": 0.0,
    # They grow a diamond where ours is a disk: a guard against another result, not equality.
    "kj grow + fill + blur": 0.1,
    "core chain": 0.2,
    "cv2 disk u8": 0.0,
    "cv2 grey disk": 0.0,
    "cv2 grey square": 0.0,
    "cv2 contour fill": 0.0,
    "cv2 flood + components": 0.0,
    "cv2 flood + components, noise (faster there)": 0.0,
    "core composite": 1e-7,
    "torch.lerp": 1e-6,
}


def agreement(runners: dict, pairs: dict) -> dict:
    """Mean difference of each peer's result and ours; ends the run where it is too large."""
    found = {}
    for peer, own in pairs.items():
        if peer not in LARGEST_MEAN_DIFFERENCE:
            continue
        theirs, ours = np.asarray(runners[peer](), np.float32), runners[own]()
        difference = float(np.abs(theirs.reshape(ours.shape) - ours).mean())
        found[f"{peer} - {own}, mean"] = difference
        if difference > LARGEST_MEAN_DIFFERENCE[peer]:
            raise SystemExit(f"{peer} and {own} differ by {difference} on average")
    return found


def measure(runners: dict, pairs: dict, rounds: int, seconds: float, check: bool) -> dict:
    report: dict = {"agreement": agreement(runners, pairs) if check else {}}
    for run in runners.values():
        run()
    wall: dict = {name: [] for name in runners}
    cpu: dict = {name: [] for name in runners}
    names, began, order = list(runners), time.perf_counter(), random.Random(0)
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        # What one leaves behind, memory given back above all, is paid by the next: no pair may
        # always meet.
        for name in order.sample(names, len(names)):
            w, c = time.perf_counter(), time.process_time()
            runners[name]()
            cpu[name].append(1000 * (time.process_time() - c))
            wall[name].append(1000 * (time.perf_counter() - w))
            # Library threads spin for a while after their work; the next contender must not pay.
            time.sleep(0.03)
    report["rounds"] = len(wall[next(iter(runners))])
    for kind, taken in (("wall", wall), ("cpu", cpu)):
        report[f"{kind}_ms"] = {name: round(median(taken[name]), 3) for name in runners}
        report[f"{kind}_ratio"] = {}
        for peer, own in pairs.items():
            # Process time may tick coarsely; a share of a tick must not divide by 0.
            ratios = [a / max(b, 1e-3) for a, b in zip(taken[peer], taken[own], strict=True)]
            report[f"{kind}_ratio"][f"{peer} / {own}"] = round(median(ratios), 2)
    saved = ("per-frame Python request", "numba request")
    if set(saved) <= set(runners):
        both = [report["wall_ms"][name] for name in saved]
        report["saved_ms_per_request"] = round(both[0] - both[1], 1)
    return report


def first_calls() -> dict:
    """Seconds of the first call in a new process, without and with compiled code on disk."""
    with tempfile.TemporaryDirectory() as cache:
        seconds = [
            float(
                subprocess.run(
                    [sys.executable, "-c", FIRST_CALL, str(harness.ROOT)],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=os.environ | {"FRUGAL_CACHE_DIR": cache},
                ).stdout
            )
            for _ in range(2)
        ]
    return {"cold_s": round(seconds[0], 2), "warm_s": round(seconds[1], 2)}


def machine() -> dict:
    device = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        device = names[0].partition(":")[2].strip() if names else device
    return {
        "device": f"{device}, {os.cpu_count()} logical cores, {platform.system()}",
        "commit": harness.commit(),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "scipy": scipy.__version__,
        "threads": THREADS,
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "simd": [
            name
            for name in ("avx2", "avx512f", "avx512vl")
            if llvmlite.binding.get_host_cpu_features().get(name)
        ],
        "load_average": [round(load, 2) for load in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else None,
    }


def cases(slow: str) -> dict:
    """Name -> function that gives (runners, pairs, whether to compare results)."""
    from frugal.bench.mask_peers import chains, operations
    from frugal.bench.mask_scenes import figure

    rng = np.random.default_rng(5)
    small = (1, 1024, 768)
    return {
        "picture 1x1024x768": lambda: (*chains(figure(*small), slow), True),
        "clip 81x480x832": lambda: (*chains(figure(81, 480, 832), slow), True),
        "clip 27x720x1280": lambda: (*chains(figure(27, 720, 1280), ""), True),
        "picture 1x3000x4000": lambda: (*chains(figure(1, 3000, 4000), ""), True),
        # OpenCV's contour area and ours rank the specks of pure noise differently.
        "noise 1x1024x768": lambda: (*chains(rng.random(small, np.float32), ""), False),
        "empty 1x1024x768": lambda: (*chains(np.zeros(small, np.float32), ""), True),
        "full 1x1024x768": lambda: (*chains(np.ones(small, np.float32), ""), True),
        "operations 1x1024x768 and 27x480x832": lambda: (
            *operations(figure(*small), figure(27, 480, 832)),
            True,
        ),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--minutes", type=float, default=6, help="for all rounds together")
    options.add_argument("--only", default="", help="cases whose name starts so, by commas")
    options.add_argument("--note", default="")
    cpu = llvmlite.binding.get_host_cpu_name()
    options.add_argument("--out", type=Path, default=harness.RESULTS / f"masks-{cpu}.json")
    chosen = options.parse_args()
    keep_memory()
    comfyui = enter()
    wanted = tuple(chosen.only.split(","))
    every = cases("core" if comfyui else "kj")
    found = {name: make for name, make in every.items() if name.startswith(wanted)}
    report = machine() | {"comfyui": comfyui, "note": chosen.note, "memory": "kept, see KEPT"}
    before = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    if any(before.get(name) != report[name] for name in ("device", "commit", "comfyui")):
        before = {"first_call": first_calls()}
    report = before | report
    seconds = 60 * chosen.minutes / len(found)
    for name, make in found.items():
        runners, pairs, check = make()
        report[name] = measure(runners, pairs, chosen.rounds, seconds, check)
        print(name, json.dumps(report[name], indent=1), flush=True)
    harness.write(chosen.out, report)


if __name__ == "__main__":
    main()
