"""Is the plan of a causal run what the run takes, and where in a forward the peak lies.

`python bench/plan_causal.py RESULTS.json TREE [TREE ...]` runs, per ComfyUI tree and in a process
of its own: plans of causal models of real size (predictions that no run here has checked); for
every pair of pieces and groups of heads the part of the blocks in which the peak lies; and tiny
causal models in fp32 on a CPU, whole runs predicted, counted on real tensors by the same counter,
and counted by torch's allocator, which knows nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import harness
import plan

FRAMES, BLOCK, SIDE = 24, 2, 16
TINY = {
    "window 6, sink 2": {"window": 6, "sink": 2, "relative": True},
    "window 6, int8": {"window": 6, "kind": "int8"},
    "window 6, fp8, main memory": {"window": 6, "kind": "fp8", "on_host": True},
    "window 6, chunked": {"window": 6, "way": "chunked"},
    "all kept": {},
}
REAL = {
    "gathered": {},
    "chunked": {"way": "chunked"},
    "int8 pages": {"kind": "int8"},
    "main memory": {"on_host": True},
}


def causal_runs() -> list[dict]:
    """Causal runs of FRAMES latent frames: weights apart, everything that is alive at most."""
    import tempfile

    import torch

    from frugal.kernels.memory.plan import CAUSAL_KV, LATENTS, WORK, Job
    from frugal.kernels.memory.trace import trace
    from frugal.nodes.memory import memory_plan_run, meta_models
    from frugal.tests.helpers import causal as videos
    from frugal.tests.helpers.memory import allocator_peak

    meta_models.TEXT_TOKENS, rows = videos.WORDS, []
    with tempfile.TemporaryDirectory() as folder:
        plain = videos.load(Path(folder))
    videos.fused(plain)
    for name, options in TINY.items():
        for cfg in (1.0, 3.0):
            model = videos.causal(plain, **options)
            job = Job(*(8 * SIDE,) * 2, 4 * FRAMES - 3, 1, cfg != 1)
            found, peaks = memory_plan_run.plan_of(model, job, 0, block=BLOCK)
            parts = found.phases[0].parts
            memory = peaks.memory(job.batch, job.latent)
            # On a CPU main memory and the device's are one, and so both are counted.
            host = memory.cache if memory.options.on_host else 0

            def call(model=model, cfg=cfg):
                return videos.run(model, FRAMES, BLOCK, SIDE, cfg)

            rows.append(
                {
                    "options": name, "cfg": cfg,
                    "forward": parts[WORK], "pages": parts[CAUSAL_KV], "latents": parts[LATENTS],
                    "pages in main memory": host,
                    "predicted": parts[WORK] + parts[CAUSAL_KV] + parts[LATENTS] + host,
                    "counted": trace(
                        call, decomposed=meta_models.kernels(torch.device("cpu"))[0]
                    ).peak,
                    "allocator": allocator_peak(call),
                }
            )  # fmt: skip
    return rows


def causal_sizes() -> list[dict]:
    """Plans of causal models of real size: a minute at 480p, guided, window 21, sink 3."""
    import torch

    from frugal.kernels.causal.options import CacheOptions
    from frugal.kernels.memory.plan import Job, MemoryOptions
    from frugal.nodes.memory import causal_trace

    rows = []
    for name, shape in plan.REAL.items():
        model = plan.shape_of(*shape, torch.bfloat16)
        for label, options in REAL.items():
            job = Job(*plan.SIZES["480p"], 961, block=3)
            peaks = causal_trace.peaks_of(
                model, torch.device("cpu"), CacheOptions(21, 3, relative=True, **options), job
            )
            memory = peaks.memory(1, job.latent)
            rows.append(
                {
                    "model": name, "options": label, "pages": memory.pages,
                    "latents": memory.latents(*job.latent[1:]),
                    "forward": peaks.of_job(job, MemoryOptions(True)),
                }
            )  # fmt: skip
    return rows


def peak_part(trace) -> str:
    """The part of a block in which the peak lies; "between" if in none: norms and modulation."""
    parts = {name: size for name, size in trace.phases.items() if not name.startswith("block")}
    most = max(parts, key=parts.get)
    if parts[most] == trace.peak:
        return most.rpartition(" ")[0]
    return "between"


def peak_parts() -> list[dict]:
    """81 frames, one condition; on a card with fused kernels and without."""
    import torch

    from frugal.kernels.memory.plan import Job, MemoryOptions
    from frugal.nodes.memory import doctor_run, meta_models

    rows, rotation = [], doctor_run.eager_rotation
    for name, shape in plan.REAL.items():
        model = plan.shape_of(*shape, torch.bfloat16)
        for device in ("cpu", "cuda"):
            # A card computes the rotation in a kernel of its own, which cannot be asked here.
            doctor_run.eager_rotation = rotation if device == "cpu" else lambda _: None
            peaks = meta_models.ForwardPeaks(model, torch.device(device))
            doctor_run.eager_rotation = rotation
            found = {}
            for pieces in (1, 2, 4, 8):
                for groups in (1, 2, 4, 8):
                    memory_options = MemoryOptions(True, pieces, groups)
                    # Every activation is in proportion to the tokens, so one size tells.
                    traced = peaks.trace(3, 1, Job(*plan.SIZES["480p"], 81).latent, memory_options)
                    found[f"{pieces}/{groups}"] = [peak_part(traced), traced.peak]
            rows.append({"model": name, "kernels of": device, "peak in": found})
    return rows


def measure(tree: str) -> dict:
    harness.enter(tree)
    import torch

    torch.set_num_threads(1)
    found = {"torch": torch.__version__, "sizes": causal_sizes(), "parts": peak_parts()}
    # Last, since they change what a text is.
    return found | {"runs": causal_runs()}


def main() -> None:
    results, *trees = sys.argv[1:]
    for name, found in harness.each_tree(__file__, results, trees).items():
        for row in found["runs"]:
            print(name, row["options"], row["cfg"],
                  f"{row['predicted'] / row['counted'] - 1:+.2%}",
                  f"{row['predicted'] / row['allocator'] - 1:+.2%}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main()
