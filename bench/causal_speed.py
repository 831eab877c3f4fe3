"""Speed and peak memory of causal Wan at its real sizes, on a GPU, beside ComfyUI's own sampler.

`python bench/causal_speed.py TREE RESULT.json [--size 1.3B|14B|tiny] [--seconds 5 60] [--cap GB]`.
Weights are random: nothing here is about quality. Each run makes a video of blocks of 3 latent
frames at 832 x 480 (tiny: 64 x 64, for a try on the CPU), 4 steps, window 21, sink 3. Counted are
the seconds to the first clean block and to the last, and the most bytes that torch allocated,
against weights + pages + one layer gathered + the forward of one block by the memory plan. The own
causal sampler of ComfyUI, where there is one, makes 5 seconds, all that it was made for. `--cap`
limits torch to so many 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import harness

WINDOW, SINK, BLOCK, STEPS = 21, 3, 3, 4
PAGES = {
    "pages, 16 bit": {},
    "paged, 16 bit": {"way": "paged", "relative": False},
    "pages, fp8": {"kind": "fp8"},
    "pages, fp8, main memory": {"kind": "fp8", "on_host": True},
    "pages, 16 bit, main memory": {"on_host": True},
}


class Clock:
    """Takes the place of what decodes: notes when each block is clean."""

    complete = True

    def __init__(self):
        self.times: list[float] = []

    def add(self, latents) -> bool:
        self.times.append(now())
        return False


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def config(size: str):
    from frugal.kernels.checkpoints.wan_shapes import WanConfig
    from frugal.kernels.memory.fit import WAN

    if size == "tiny":
        return WanConfig(dim=256, ffn_dim=512, layers=2, in_dim=16, out_dim=16)
    return WAN[f"Wan {size} T2V"]


def model(size: str, causal_ar: bool = False):
    """A MODEL of random weights in 16 bits."""
    import comfy.sd
    import torch

    from frugal.kernels.checkpoints.wan_shapes import parameters

    make = torch.Generator().manual_seed(1)
    state = {
        name: (0.02 * torch.randn(each.shape, generator=make)).to(torch.bfloat16)
        for name, each in parameters(config(size)).items()
    }
    extra = {}
    if causal_ar:
        extra["metadata"] = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={}, **extra)


def sampled(patcher, sampler, frames: int, side: tuple[int, int], clock: Clock | None) -> dict:
    import comfy.sample
    import torch

    latent = torch.zeros(1, 16, frames, *side)
    text = [[torch.zeros(1, 512, 4096), {}]]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sigmas = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])
    started, steps = now(), []
    comfy.sample.sample_custom(
        patcher, comfy.sample.prepare_noise(latent, 1), 1.0, sampler, sigmas, text, text, latent,
        disable_pbar=True, seed=1, callback=lambda *_: steps.append(now()),
    )  # fmt: skip
    ended = now()
    # Without a clock the first clean block is behind its last step.
    first = clock.times[0] if clock else steps[min(STEPS, len(steps)) - 1]
    pictures = 4 * frames - 3
    row = {
        "latent_frames": frames,
        "seconds": ended - started,
        "seconds_to_first_block": first - started,
        "fps": pictures / (ended - started),
    }
    if clock and len(clock.times) > 4:
        # Without the first block, in which weights are moved and kernels are chosen.
        steady = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
        row["fps_steady"] = 4 * BLOCK / steady
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def ours(size: str, options: dict, frames: int, side: tuple[int, int]) -> dict:
    import comfy.samplers

    from frugal.kernels.causal.options import CacheOptions
    from frugal.nodes.causal import model_run, sampler_run

    chosen = CacheOptions(window=WINDOW, sink=SINK, **({"relative": True} | options))
    patcher = model_run.make_causal(model(size), chosen, 5.0)[0]
    clock = Clock()
    job = sampler_run.Job(live=clock)  # pyright: ignore
    sampler = comfy.samplers.KSAMPLER(
        sampler_run.sample_causal, {"frames_per_block": BLOCK, "job": job}
    )
    row = sampled(patcher, sampler, frames, side, clock)
    row["pool_peak_bytes"] = job.cache.pool.peak_bytes
    if job.cache.paged is not None:
        row["attention"] = job.cache.paged.text()
    staging = job.cache.staging
    if staging is not None:
        row |= {"staging_bytes": staging.peak_bytes, "ahead": staging.ahead, "late": staging.late}
    row["formula_bytes"] = formula(size, job.cache, frames, side)
    return row


def formula(size: str, cache, frames: int, side: tuple[int, int]) -> int | None:
    """Weights, pages on the device, one layer gathered in the compute type, one block's forward."""
    from frugal.kernels.memory.fit import PEAK_PER_TOKEN, wan_bytes

    per_token = PEAK_PER_TOKEN.get(config(size).dim)
    if per_token is None:
        return None
    kept = min(frames, WINDOW + SINK)
    tokens = side[0] * side[1] // 4
    pages = (2 if cache.options.on_host else config(size).layers) * kept * cache.fmt.page_bytes
    gathered = 2 * kept * tokens * config(size).dim * 2
    return wan_bytes(config(size), "fp16") + pages + gathered + BLOCK * tokens * per_token


def native(size: str, frames: int, side: tuple[int, int]) -> dict | None:
    import comfy.samplers

    if "ar_video" not in comfy.samplers.KSAMPLER_NAMES + getattr(
        comfy.samplers, "SAMPLER_NAMES", []
    ):
        return None
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": BLOCK})
    return sampled(model(size, causal_ar=True), sampler, frames, side, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("tiny", "1.3B", "14B"), default="1.3B")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 60])
    parser.add_argument("--cap", type=float, default=0.0)
    asked = parser.parse_args()
    harness.enter(asked.tree)
    import comfy.cli_args
    import torch

    cuda = torch.cuda.is_available()
    comfy.cli_args.args.cpu = not cuda
    logging.disable(logging.CRITICAL)
    if asked.cap and cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.cap * 1e9 / total))
    side = (8, 8) if asked.size == "tiny" else (60, 104)
    rows: dict[str, list] = {}
    with torch.inference_mode():
        for name, options in PAGES.items():
            for seconds in asked.seconds:
                row = ours(asked.size, options, seconds * 4 + 1, side)
                rows.setdefault(name, []).append(row)
                print(name, json.dumps(row), flush=True)
        found = native(asked.size, 21, side)
        if found:
            rows["ComfyUI"] = [found]
            print("ComfyUI", json.dumps(found), flush=True)
    harness.write(
        asked.out,
        {
            "commit": harness.commit(),
            "tree": asked.tree.name,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "size": asked.size,
            "cap_gb": asked.cap,
            "steps": STEPS,
            "window": WINDOW,
            "sink": SINK,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
