"""Attention kernels on the calls that Wan and CatVTON make, and whether "auto" finds the best.

`python bench/attention.py TREE RESULT.json [--shrink N] [--threads N]`, then `python
bench/attention.py --table RESULT.json ...`. Every kernel that can run here, and the attention
function that the ComfyUI in TREE takes by default, in turns of one call each on the same random
numbers: median milliseconds, TFLOP/s (4 * B * H * Lq * Lk * D over the time), and the relative L2
error against float64 on 256 query rows. `auto` is what the choice took before the turns, and its
time in them as a ratio to the fastest exact kernel. On a CPU the calls are shrunk, four heads at
most and the tokens divided by N (16 if not given), because a whole one takes minutes, and
milliseconds are those of the processor, all threads together, so that other programs count little;
on a GPU they are whole. 8-bit kernels are listed and never chosen here; torch-math and chunked,
which are tried only where nothing else serves, are left out.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path

import harness

TURNS = 5
ROWS = 256
# Name -> (heads, query tokens, key tokens, head width), one picture each.
CALLS = {
    "Wan 14B self, 480x832x81": (40, 32760, 32760, 128),
    "Wan 14B self, 720x1280x81": (40, 75600, 75600, 128),
    "Wan 1.3B self, 480x832x81": (12, 32760, 32760, 128),
    "Wan 14B text, 480x832x81": (40, 32760, 512, 128),
    "Wan 14B image, 480x832x81": (40, 32760, 257, 128),
    "CatVTON 768x1024, level 1": (8, 24576, 24576, 40),
    "CatVTON 768x1024, level 2": (8, 6144, 6144, 80),
    "CatVTON 768x1024, level 3": (8, 1536, 1536, 160),
}


def enter(tree: str) -> None:
    """Import the pack and ComfyUI as the tests do; on a GPU without their CPU mode."""
    harness.enter(tree)
    import torch

    if torch.cuda.is_available():
        import comfy.cli_args

        comfy.cli_args.args.cpu = False


def shrunk(call: tuple[int, int, int, int], shrink: int) -> tuple[int, int, int, int]:
    heads, q_len, k_len, width = call
    tokens = [n if n <= 512 else 8 * round(n / shrink / 8) for n in (q_len, k_len)]
    return min(heads, 4), *tokens, width


def measure(tree: str, out: Path, shrink: int) -> None:
    enter(tree)
    logging.disable(logging.CRITICAL)
    import comfy.ldm.modules.attention as core
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    dtypes = (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16, torch.float16)
    rows: list[dict] = []
    result = {
        **harness.place(tree, device),
        "shrink": shrink if on_cpu else 1,
        "default": core.optimized_attention.__name__,
        "rows": rows,
    }
    with torch.inference_mode():
        shapes = {name: shrunk(c, shrink) if on_cpu else c for name, c in CALLS.items()}
        for name, shape in shapes.items():
            if name != next(n for n, s in shapes.items() if s == shape):
                continue
            for dtype in dtypes:
                rows.append({"call": name, **one(shape, dtype, device, core.optimized_attention)})
                print(json.dumps(rows[-1]), flush=True)
                harness.write(out, result)


def one(shape: tuple[int, int, int, int], dtype, device, default) -> dict:
    """All kernels on one call."""
    import torch

    from frugal.kernels.attention import KernelSelector
    from frugal.kernels.attention.backends import BACKENDS, launch
    from frugal.kernels.attention.call import describe, device_kind
    from frugal.kernels.attention.call_report import table
    from frugal.kernels.attention.selector import default_scale

    heads, q_len, k_len, width = shape
    make = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads * width, generator=make, device=device).to(dtype)
        for n in (q_len, k_len, k_len)
    )
    # As the models hold them: tokens before heads.
    q, k, v = (each.unflatten(2, (heads, width)).transpose(1, 2) for each in (q, k, v))
    call = describe(q, k, v, None, lossy=True)
    scale = default_scale(call)

    def native(q, k, v, mask=None, scale=None):
        heads = q.shape[1]
        q, k, v = (each.transpose(1, 2).flatten(2) for each in (q, k, v))
        return default(q, k, v, heads, skip_output_reshape=True)

    kernel_selector = KernelSelector(device)
    kernel_selector.attend(q, k, v, default=native)
    chosen = table(kernel_selector).rows[0].backend
    runs = {"default": native}
    exact = {"default"}
    for backend in BACKENDS:
        here = backend.absent(device_kind(device)) is None and backend.refusal(call) is None
        if here and backend.automatic and not backend.fallback:
            runs[backend.name] = lambda q, k, v, b=backend: launch(b, q, k, v, None, scale)
            exact |= {backend.name} if backend.exact else set()
    picked = torch.linspace(0, q_len - 1, min(ROWS, q_len), device=device).round().long()
    errors, failed = {}, {}
    for name, run in list(runs.items()):
        try:
            errors[name] = error(run(q, k, v), q, k, v, picked, scale)
        except Exception as raised:
            failed[name] = f"{type(raised).__name__}: {str(raised).splitlines()[0][:80]}"
            del runs[name]
    times = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            times[name].append(seconds(run, q, k, v))
    median = {name: statistics.median(each) for name, each in times.items()}
    best = min((n for n in median if n in exact and errors[n] < 1e-2), key=median.__getitem__)
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": {
            name: {
                "ms": round(1e3 * median[name], 3),
                "tflops": round(call.flops / median[name] / 1e12, 4),
                "error": float(f"{errors[name]:.2g}"),
            }
            for name in sorted(median, key=median.__getitem__)
        },
        "failed": failed,
        "best": best,
        "auto": chosen,
        "auto_to_best": round(median[chosen] / median[best], 3),
        "default_to_auto": round(median["default"] / median[chosen], 3),
    }


def error(out, q, k, v, rows, scale: float) -> float:
    """Relative L2 error of these rows over all heads against float64, head by head."""
    import torch

    from frugal.kernels.attention.eager import reference

    off = size = 0.0
    for head in range(q.shape[1]):
        want = reference(q[0, head, rows], k[0, head], v[0, head], None, scale, torch.float64)
        off += float((out[0, head, rows].double() - want).square().sum())
        size += float(want.square().sum())
    return (off / size) ** 0.5


def seconds(run, q, k, v) -> float:
    import torch

    if not q.is_cuda:
        start = time.process_time()
        run(q, k, v)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(q, k, v)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def show(path: Path) -> None:
    """The file as a Markdown table."""
    held = json.loads(path.read_text("utf-8"))
    print(f"{held['device']}, {held['threads']} threads, torch {held['torch']}, {held['tree']}")
    print("| call | heads, tokens, keys, width | type | kernels (ms) | auto | to best | gain |")
    print("|---|---|---|---|---|---|---|")
    for row in held["rows"]:
        kernels = ", ".join(f"{name} {each['ms']:g}" for name, each in row["kernels"].items())
        print(
            f"| {row['call']} | {', '.join(map(str, row['shape']))} | {row['dtype']} | {kernels} "
            f"| {row['auto']} | {row['auto_to_best']:.2f} | {row['default_to_auto']:.2f}x |"
        )


if __name__ == "__main__":
    parser = harness.arguments(__doc__)
    parser.add_argument("--shrink", type=int, default=16)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.table:
        for path in given.table:
            show(path)
    else:
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        measure(given.tree, given.out, given.shrink)
