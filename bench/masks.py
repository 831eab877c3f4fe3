"""Mask refinement against OpenCV pipelines that do the same, interleaved in one run.

    python bench/masks.py [--rounds 9] [--note "..."]

Chain: threshold 0.5, fill all holes, drop islands below 200 px, grow 16 px (disk), feather 12 px.
Every contender gets two threads and returns a new float32 array. Each round runs all of them once,
in turn; the figures are medians over rounds, and the ratio is the median of the rounds' ratios of
process CPU time, which other load on the machine disturbs least. Writes bench/results/masks.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import numba
import numpy as np
import scipy
import torch
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
THREADS, GROW, FEATHER, ISLAND = 2, 16, 12, 200
SIZES = {"clip 27x480x832": (27, 480, 832), "picture 1x1024x768": (1, 1024, 768)}


def register_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "frugal", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["frugal"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["frugal"])


def figure(frames: int, height: int, width: int) -> np.ndarray:
    """A walking figure of capsules with a ragged outline, 24 holes and 40 specks in each frame."""
    rng = np.random.default_rng(0)
    clip = np.zeros((frames, height, width), np.float32)
    scale = height / 480
    for t in range(frames):
        canvas = np.zeros((height, width), np.uint8)
        centre = width * (0.5 + 0.1 * np.sin(t / 9))

        def at(x, y, centre=centre):
            return int(centre + x * scale), int(height / 2 + y * scale)

        def limb(a, b, thickness, canvas=canvas):
            cv2.line(canvas, a, b, 255, max(1, int(thickness * scale)))

        cv2.circle(canvas, at(0, -170), int(38 * scale), 255, -1)
        limb(at(0, -110), at(0, 40), 100)
        for side in (-1, 1):
            swing = 40 * np.sin(t / 5 + side)
            limb(at(60 * side, -110), at(108 * side + swing, 40), 34)
            limb(at(30 * side, 40), at(42 * side - swing, 220), 48)
        ragged = ndimage.gaussian_filter(rng.random((height, width), np.float32), 2)
        canvas = np.where(ragged > 0.5, canvas, cv2.erode(canvas, np.ones((5, 5), np.uint8)))
        for _ in range(24):
            spot = at(rng.integers(-45, 46), rng.integers(-100, 40))
            cv2.circle(canvas, spot, int(rng.integers(1, 10)), 0, -1)
        for _ in range(40):
            spot = int(rng.integers(width)), int(rng.integers(height))
            cv2.circle(canvas, spot, int(rng.integers(0, 5)), 255, -1)
        clip[t] = canvas / np.float32(255)
    return clip


def over_frames(one):
    """The contender that runs `one(frame, out)` over a clip on THREADS threads."""

    def run(clip: np.ndarray) -> np.ndarray:
        out = np.empty_like(clip)
        if len(clip) == 1:
            cv2.setNumThreads(THREADS)
            one(clip[0], out[0])
            return out
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, clip, out))
        return out

    return run


def opencv_clean(frame: np.ndarray) -> np.ndarray:
    """Fill and drop by outer contours: the fastest way in OpenCV."""
    bits = cv2.threshold(frame, 0.5, 255, cv2.THRESH_BINARY)[1].astype(np.uint8)
    contours, _ = cv2.findContours(bits, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    bits[:] = 0
    kept = [c for c in contours if cv2.contourArea(c) >= ISLAND]
    return cv2.drawContours(bits, kept, -1, 255, cv2.FILLED)


def disk() -> np.ndarray:
    y, x = np.mgrid[-GROW : GROW + 1, -GROW : GROW + 1]
    return (y * y + x * x <= GROW * GROW).astype(np.uint8)


def opencv_blur(frame: np.ndarray, out: np.ndarray) -> None:
    """Peer A: contour clean, dilation by a disk, three float32 box blurs."""
    from frugal.kernels.masks.settings import box_widths

    value = cv2.dilate(opencv_clean(frame), disk()).astype(np.float32) * np.float32(1 / 255)
    for width in box_widths(FEATHER):
        value = cv2.blur(value, (width, width), borderType=cv2.BORDER_REPLICATE)
    out[:] = value


def opencv_ramp(frame: np.ndarray, out: np.ndarray) -> None:
    """Peer E: contour clean, one exact distance transform for growing and ramp together.

    It measures from the mask before growing, so its ramp starts GROW px out and is not the same
    ramp; there is no faster exact way in OpenCV.
    """
    far = cv2.distanceTransform(255 - opencv_clean(frame), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    np.clip(1 - (far - GROW) * np.float32(1 / FEATHER), 0, 1, out=out)


def core_grow(frame: np.ndarray, out: np.ndarray) -> None:
    """What ComfyUI's Grow Mask does: one SciPy grey dilation for every pixel of growth."""
    cross = ndimage.generate_binary_structure(2, 1)
    for _ in range(GROW):
        frame = ndimage.grey_dilation(frame, footprint=cross)
    out[:] = frame


def contenders() -> dict:
    from frugal.kernels.masks.refine import RefineSettings, refine

    clean = dict(fill_holes=-1, drop_islands=ISLAND)

    def ours(**settings):
        chosen = RefineSettings(**settings)
        return lambda clip: refine(clip, chosen, threads=THREADS)

    def copy(clip):
        out = np.empty_like(clip)
        np.copyto(out, clip)
        return out

    return {
        "numba gaussian": ours(**clean, grow=GROW, feather=FEATHER, feather_mode="gaussian"),
        "opencv A": over_frames(opencv_blur),
        "numba ramp": ours(**clean, grow=GROW, feather=FEATHER),
        "opencv E": over_frames(opencv_ramp),
        "numba grow": ours(grow=GROW, grow_shape="diamond"),
        "core grow": over_frames(core_grow),
        "copy": copy,
    }


RATIOS = {"opencv A": "numba gaussian", "opencv E": "numba ramp", "core grow": "numba grow"}
# Different by construction: contour areas, and the start of E's ramp.
LARGEST_MEAN_DIFFERENCE = {"opencv A": 1e-3, "opencv E": 0.01, "core grow": 0.0}


def measure(clip: np.ndarray, rounds: int) -> dict:
    runners = contenders()
    first = {name: run(clip) for name, run in runners.items()}
    report: dict = {"agreement": {}, "wall_ms": {}, "cpu_ms": {}, "cpu_ratio": {}, "wall_ratio": {}}
    for peer, own in RATIOS.items():
        difference = float(np.abs(first[peer] - first[own]).mean())
        report["agreement"][f"{peer} - {own}, mean"] = difference
        if difference > LARGEST_MEAN_DIFFERENCE[peer]:
            raise SystemExit(
                f"{peer} and {own} differ by {difference} on average: not like for like"
            )
    del first
    wall: dict = {name: [] for name in runners}
    cpu: dict = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            w, c = time.perf_counter(), time.process_time()
            run(clip)
            cpu[name].append(1000 * (time.process_time() - c))
            wall[name].append(1000 * (time.perf_counter() - w))
    for kind, taken in (("wall", wall), ("cpu", cpu)):
        for name in runners:
            report[f"{kind}_ms"][name] = round(median(taken[name]), 3)
        for peer, own in RATIOS.items():
            ratios = [a / b for a, b in zip(taken[peer], taken[own], strict=True)]
            report[f"{kind}_ratio"][f"{peer} / {own}"] = round(median(ratios), 2)
    return report


def machine() -> dict:
    device = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        device = names[0].partition(":")[2].strip() if names else device
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": f"{device}, {os.cpu_count()} logical cores, {platform.system()}",
        "commit": commit,
        "python": platform.python_version(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "scipy": scipy.__version__,
        "threads": THREADS,
        "load_average": [round(load, 2) for load in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else None,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--note", default="")
    options.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "masks.json")
    chosen = options.parse_args()
    register_pack()
    report = machine() | {"rounds": chosen.rounds, "note": chosen.note}
    for name, shape in SIZES.items():
        report[name] = measure(figure(*shape), chosen.rounds)
        print(name, json.dumps(report[name], indent=1))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    partial = chosen.out.with_suffix(".part")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, chosen.out)


if __name__ == "__main__":
    main()
