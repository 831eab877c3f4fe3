"""Bytes of the attention cache by length of video: constant here, growing in ComfyUI's own sampler.

`python bench/causal.py TREE RESULT.json` with a ComfyUI that has causal Wan (0.33), then
`python bench/causal.py --table RESULT.json`. A random-weight Wan (width 256, 2 layers, 16 tokens a
latent frame, fp32) makes videos of 5 to 60 seconds on the CPU; counted are the bytes of all pages
in use or free, the most at any step, and the bytes of the tensors that ComfyUI's own sampler makes.
For the published sizes the same count is arithmetic: bytes per page by layers by kept frames.
Random weights say nothing of picture quality, and nothing here is about speed.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import harness

SECONDS = (5, 15, 30, 60)
WINDOW, SINK, BLOCK = 21, 3, 3
# Layers, heads of 128, tokens of a latent frame at 832 x 480.
SIZES = {"1.3B": (30, 12, 1560), "14B": (40, 40, 1560)}


def latent_frames(seconds: int) -> int:
    """Of a video at 16 pictures a second: one for the first picture, then one for each 4."""
    return seconds * 4 + 1


def measure(tree: Path, out: Path) -> None:
    harness.enter(tree)
    import torch

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        result = {
            "tree": tree.name,
            "torch": torch.__version__,
            "device": "cpu",
            "window": WINDOW,
            "sink": SINK,
            "frames_per_block": BLOCK,
            "counted": counted(Path(folder)),
            "rounding": rounding(Path(folder)),
            "arithmetic": arithmetic(),
        }
    harness.write(out, result)


def counted(folder: Path) -> list[dict]:
    import torch

    from frugal.nodes.causal.sampler_run import Job
    from frugal.tests.helpers import causal as videos

    sigmas = torch.tensor([1.0, 0.0])
    plain = videos.load(folder)
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    (folder / "native").mkdir()
    native = videos.load(folder / "native", metadata=metadata)
    rows = []
    for seconds in SECONDS:
        frames, row = latent_frames(seconds), {"seconds": seconds}
        for kind in ("model", "fp8"):
            model = videos.causal(plain, window=WINDOW, sink=SINK, relative=True, kind=kind)
            job, most = Job(keep=True), [0]

            def look(*_, job=job, most=most):
                most[0] = max(most[0], job.cache.pool.held_bytes)

            videos.make(model, frames, BLOCK, job, sigmas=sigmas, callback=look)
            look()
            row[f"pages, {kind}"] = most[0]
        row["native"] = native_bytes(native, frames, sigmas)
        rows.append({"latent_frames": frames, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def native_bytes(model, frames: int, sigmas) -> int:
    """Of what ComfyUI's own causal sampler makes to hold keys and values."""
    import comfy.sample
    import comfy.samplers
    import torch

    from frugal.tests.helpers import causal as videos

    network, sizes = model.model.diffusion_model, []
    make = network.init_kv_caches

    def counting(*args, **kwargs):
        caches = make(*args, **kwargs)
        sizes.append(sum(cache[name].nbytes for cache in caches for name in ("k", "v")))
        return caches

    network.init_kv_caches = counting
    try:
        comfy.sample.sample_custom(
            model, videos.noise(frames), 1.0,
            comfy.samplers.ksampler("ar_video", {"num_frame_per_block": BLOCK}), sigmas,
            [[videos.prompt_of(5), {}]], [[videos.prompt_of(6), {}]],
            torch.zeros(1, 16, frames, videos.SIDE, videos.SIDE), seed=1, disable_pbar=True,
        )  # fmt: skip
    finally:
        del network.init_kv_caches
    return sum(sizes)


def rounding(folder: Path) -> dict[str, dict[str, float]]:
    """Relative L2 error of 8 bit pages: of keys and values, and of the video of 24 frames."""
    from frugal.nodes.causal.sampler_run import Job
    from frugal.tests.helpers import causal as videos

    plain, found = videos.load(folder), {}
    exact = videos.make(videos.causal(plain, window=WINDOW), 24, BLOCK)
    for kind in ("fp8", "int8"):
        job = Job(keep=True)
        made = videos.make(videos.causal(plain, window=WINDOW, kind=kind), 24, BLOCK, job)
        found[kind] = {
            "keys_values": job.cache.error,
            "video": float((made - exact).norm() / exact.norm()),
        }
    return found


def arithmetic() -> list[dict]:
    import torch

    from frugal.kernels.causal.storage import PageFormat

    rows = []
    for name, (layers, heads, tokens) in SIZES.items():
        for kind in ("model", "fp8"):
            fmt = PageFormat((1, tokens, heads, 128), torch.bfloat16, kind)
            frame = layers * fmt.page_bytes
            rows.append(
                {
                    "model": name,
                    "pages": "bf16" if kind == "model" else kind,
                    "bytes_per_latent_frame": frame,
                    "bytes_window_and_sink": (WINDOW + SINK) * frame,
                    "bytes_all_60_s": latent_frames(60) * frame,
                }
            )
    return rows


def table(path: Path) -> str:
    result = json.loads(path.read_text("utf-8"))
    rule = "|" + "---|" * 5
    lines = ["| seconds | latent frames | pages, as computed | pages, fp8 | native |", rule]
    for row in result["counted"]:
        sizes = [row["pages, model"], row["pages, fp8"], row["native"]]
        counts = [str(row["seconds"]), str(row["latent_frames"])]
        cells = [*counts, *(f"{size / 1e6:.3f} MB" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | pages | latent frame | window and sink | 60 s, all kept |", rule]
    for row in result["arithmetic"]:
        sizes = [
            row[key]
            for key in ("bytes_per_latent_frame", "bytes_window_and_sink", "bytes_all_60_s")
        ]
        cells = [row["model"], row["pages"], *(f"{size / 1e9:.2f} GB" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(Path(sys.argv[2])))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
