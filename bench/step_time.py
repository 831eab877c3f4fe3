"""One step of Wan in ComfyUI: as it comes against our attention, compiled blocks and both.

`python bench/step_time.py TREE RESULT.json [--size NAME] [--rounds N] [--ways WAY ...]
[--weights KIND ...]`, then `python
bench/step_time.py --table RESULT.json ...`. NAME is one of SIZES; left out, 14b on a GPU and cpu on
a processor; tiny says nothing and is there to see that the script runs. Random weights, cfg 1, one
call of the network per step. Ways run in turns of STEPS steps; the figure of a way is the median of
its steps after its first, in seconds by the clock on a GPU and of the processor on a CPU, so that
other programs count little. What the first step takes longer is told apart, with the graphs made.
"core" is ComfyUI's own TorchCompileModel, the whole network in one unit. `streamed` rows keep every
weight where it was loaded, as when it does not fit, and cast it layer by layer; on a processor that
is the same memory. `difference` is the relative L2 distance of one call's result from the native
one. A way that fails is listed with its reason.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

import harness
from attention import enter

STEPS = 3
NATIVE = "native"
WAYS = (NATIVE, "attention", "compiled", "attention and compiled", "core")
KINDS = RESIDENT, STREAMED = "resident", "streamed"
# Name -> (width, hidden width, layers, latent frames, height, width).
SIZES = {
    "tiny": (256, 512, 2, 2, 8, 8),
    "cpu": (512, 2048, 4, 5, 40, 40),
    "1.3b": (1536, 8960, 30, 21, 60, 104),
    "14b": (5120, 13824, 40, 21, 60, 104),
    "14b-720p": (5120, 13824, 40, 21, 90, 160),
}


class Clock:
    """An APPLY_MODEL wrapper that takes the time of each call of the network."""

    def __init__(self, device):
        self.device, self.seconds, self.first = device, [], None

    def now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        import torch

        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, executor, *args, **kwargs):
        start = self.now()
        out = executor(*args, **kwargs)
        self.seconds.append(self.now() - start)
        if self.first is None:
            self.first = out.float().cpu()
        return out


def model_of(size: tuple[int, ...], device):
    """A ModelPatcher of random weights, bfloat16 on a GPU and float32 on a processor."""
    import comfy.sd
    import torch

    from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters

    dim, ffn_dim, layers, *_ = size
    config = WanConfig(dim=dim, ffn_dim=ffn_dim, layers=layers, in_dim=16, out_dim=16)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = torch.Generator(device).manual_seed(1)
    held = {}
    for name, parameter in parameters(config).items():
        values = torch.randn(parameter.shape, generator=make, device=device)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= values[0].numel() ** -0.5 if values.dim() > 1 else 0.02
        held[name] = values.to(dtype).cpu()
    return comfy.sd.load_diffusion_model_state_dict(held, {"dtype": dtype})


def prepared(model: Any, way: str, reports: list) -> Any:
    from frugal.nodes.sampling import attention_run, compile_run

    if way == "core":
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]
    if "attention" in way:
        model = attention_run.apply(model)
    if "compiled" in way:
        model = compile_run.apply(model, reports.append)
    return model.clone()


def ways_of(
    model: Any, size: tuple[int, ...], ways: list[str], streamed: bool, rounds: int, device
) -> dict:
    import comfy.sample
    import torch
    from comfy.patcher_extension import WrappersMP

    _, _, _, frames, height, width = size
    latent = torch.zeros(1, 16, frames, height, width)
    noise = comfy.sample.prepare_noise(latent, 1)
    text = 0.1 * torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(2))
    prompt = [[text, {}]]
    runs: dict[str, tuple[Any, Clock, list]] = {}
    failed: dict[str, str] = {}
    for way in ways:
        reports: list = []
        try:
            ready = prepared(model, way, reports)
        except Exception as error:
            failed[way] = reason(error)
            continue
        clock = Clock(device)
        ready.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench.clock", clock)
        if streamed:
            ready.partially_load = lambda place, *_, own=ready, **__: own.patch_model(
                place, lowvram_model_memory=64
            )
        runs[way] = ready, clock, reports
    for _ in range(rounds):
        for way, (ready, _, _) in list(runs.items()):
            try:
                comfy.sample.sample(
                    ready, noise, STEPS, 1.0, "euler", "simple", prompt, prompt, latent,
                    disable_pbar=True, seed=1,
                )  # fmt: skip
            except Exception as error:
                failed[way] = reason(error)
                del runs[way]
    want = runs[NATIVE][1].first
    rows = {}
    for way, (_, clock, reports) in runs.items():
        seconds = statistics.median(clock.seconds[1:])
        rows[way] = {
            "seconds": round(seconds, 4),
            "gain": round(statistics.median(runs[NATIVE][1].seconds[1:]) / seconds, 3),
            "first step longer by": round(clock.seconds[0] - seconds, 2),
            "difference": float(f"{(clock.first - want).norm() / want.norm():.2g}"),
        }
        if reports:
            made = sum(each.graphs for each in reports)
            calls = sum(each.calls for each in reports)
            rows[way] |= {"graphs": made, "compiled calls": calls}
    return {"rows": rows, "failed": failed}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


def measure(
    tree: str, out: Path, name: str | None, rounds: int, ways: list[str], weights: list[str]
) -> None:
    enter(tree)
    logging.disable(logging.CRITICAL)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = name or ("14b" if device.type == "cuda" else "cpu")
    size = SIZES[name]
    result: dict[str, Any] = {
        **harness.place(tree, device),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "size": name,
        "tokens": size[3] * size[4] * size[5] // 4,
    }
    with torch.inference_mode():
        model = model_of(size, device)
        for label in weights:
            result[label] = ways_of(model, size, ways, label == STREAMED, rounds, device)
            print(label, json.dumps(result[label]), flush=True)
            harness.write(out, result)


def show(paths: list[Path]) -> None:
    """The files as a Markdown table."""
    print(
        "| size, tokens | weights | way | s per step | gain | first step longer, s | difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for path in paths:
        held = json.loads(path.read_text("utf-8"))
        for label in [each for each in KINDS if each in held]:
            for way, row in held[label]["rows"].items():
                print(
                    f"| {held['size']}, {held['tokens']} | {label} | {way} | {row['seconds']} "
                    f"| {row['gain']:.2f}x | {row['first step longer by']} | {row['difference']} |"
                )
            for way, why in held[label]["failed"].items():
                print(f"| {held['size']}, {held['tokens']} | {label} | {way} | {why} | | | |")


if __name__ == "__main__":
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--weights", choices=KINDS, nargs="+", default=list(KINDS))
    given = parser.parse_args()
    if given.table:
        show(given.table)
    else:
        ways = [NATIVE, *(way for way in given.ways if way != NATIVE)]
        measure(given.tree, given.out, given.size, given.rounds, ways, given.weights)
