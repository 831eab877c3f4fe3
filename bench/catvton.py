"""CatVTON's sampling against the same steps in diffusers, same random weights, in one run.

    python bench/catvton.py COMFYUI_FOLDER [--size 128x192] [--batch 1] [--cfg 2.5] [--steps 2]
        [--rounds 2] [--device cpu] [--contenders "diffusers fp32,ours fp32,ours int8"]
        [--width 320] [--threads 2] [--note "..."] [--out FILE]

Every contender is a process of its own, so that its peak memory is its own; they take turns round
by round. diffusers' side is its UNet with skipped cross-attention and its DDIM, as the published
pipeline runs them; ours is 'Load CatVTON' and ComfyUI's sampling, "ours+torch" the same with
ComfyUI's attention by PyTorch instead of its default. A round is `steps` DDIM steps
(eta 1, injected noise) from the same start; the figures are medians over rounds. On a CPU, peak
memory is the process's peak resident size minus that before the model was made; on CUDA, torch's
peak of allocated memory. "forward error" is of one forward at t = 601 against the first contender.

At the published size on a CUDA card:
    --device cuda --size 768x1024 --steps 10 --rounds 3 \
        --contenders "diffusers fp16,ours fp16,ours int8"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import harness
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALE = 0.18215
SEED = 0


def structure(width: int) -> dict:
    """SD 1.5's inpainting UNet; `width` 320 is the real one."""
    return {
        "in_channels": 9,
        "out_channels": 4,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def write_base(folder: Path, width: int) -> Path:
    """A base in diffusers names, fp16: Gaussian weights of variance 1 / inputs, spread norms."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = UNet2DConditionModel(**structure(width)).state_dict()
    g, made = torch.Generator().manual_seed(SEED), {}
    for name, tensor in shapes.items():
        values = torch.randn(tensor.shape, generator=g)
        if tensor.ndim > 1:
            values *= tensor[0].numel() ** -0.5
        else:
            # Norm weights all 1 would hide a skipped norm2.
            values = values.mul_(0.3).add_(1.0 if "norm" in name and "weight" in name else 0.0)
        made[name] = values.half()
    path = folder / "base.safetensors"
    save_file(made, path)
    return path


def start_of(size: tuple[int, int], batch: int, steps: int) -> tuple[torch.Tensor, ...]:
    """(x_T, masked and garment latents, mask, noise per step), all on the CPU in fp32."""
    g = torch.Generator().manual_seed(SEED + 1)
    h, w = size[1] // 8, size[0] // 8
    person, garment = torch.randn(2, batch, 4, h, w, generator=g) * 0.8
    mask = torch.zeros(batch, 1, h, w)
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 1
    x, noise = (torch.randn(*lead, batch, 4, 2 * h, w, generator=g) for lead in ((), (steps,)))
    return x, person, garment, mask, noise


class Diffusers:
    """The published pipeline's loop on diffusers' parts."""

    def __init__(self, base: Path, options: argparse.Namespace, kind: str):
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from safetensors.torch import load_file

        self.device, self.dtype = torch.device(options.device), DTYPES[kind]
        with torch.device("meta"):
            unet = UNet2DConditionModel(**structure(options.width))
        weights = {n: t.to(self.device, self.dtype) for n, t in load_file(base).items()}
        unet.load_state_dict(weights, assign=True)
        self.unet = unet.eval().requires_grad_(False)
        self.unet.set_attn_processor(
            {
                name: _Skip() if name.endswith("attn2.processor") else processor
                for name, processor in self.unet.attn_processors.items()
            }
        )
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )

    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.unet.parameters())

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        made = self.unet(x.to(self.device, self.dtype), t, encoder_hidden_states=None)
        return made.sample.float().cpu()

    def sample(self, given: tuple[torch.Tensor, ...], cfg: float) -> torch.Tensor:
        x, person, garment, mask, noise = (t.to(self.device, self.dtype) for t in given)
        masks = torch.cat([mask, torch.zeros_like(mask)], 2)
        with_garment = torch.cat([masks, torch.cat([person, garment], 2)], 1)
        without = torch.cat([masks, torch.cat([person, torch.zeros_like(garment)], 2)], 1)
        extra = torch.cat([without, with_garment]) if cfg > 1 else with_garment
        self.scheduler.set_timesteps(len(noise))
        for t, fresh in zip(self.scheduler.timesteps, noise, strict=True):
            double = torch.cat([x, x]) if cfg > 1 else x
            guess = self.unet(torch.cat([double, extra], 1), t, encoder_hidden_states=None).sample
            if cfg > 1:
                uncond, cond = guess.chunk(2)
                guess = uncond + cfg * (cond - uncond)
            x = self.scheduler.step(guess, t, x, eta=1.0, variance_noise=fresh)[0]
        return x.float().cpu()


class _Skip:
    """Cross-attention left out, as the published processor does it."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


class Ours:
    """'Load CatVTON' and ComfyUI's sampling."""

    def __init__(self, base: Path, options: argparse.Namespace, kind: str):
        loading = importlib.import_module("frugal.nodes.tryon.load_run")
        eight_bit = kind in ("int8", "fp8")
        dtype = ("fp16" if options.device == "cuda" else "auto") if eight_bit else kind
        quantize = kind if eight_bit else "as stored"
        self.patcher = loading.load_catvton(str(base), None, dtype, quantize)

    def weight_bytes(self) -> int:
        return self.patcher.model_size()

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.patcher])
        model, device = self.patcher.model, self.patcher.load_device
        cast = model.manual_cast_dtype or model.get_dtype()
        made = model.diffusion_model(
            x.to(device, cast), torch.full((len(x),), t, device=device), context=None
        )
        return made.float().cpu()

    def sample(self, given: tuple[torch.Tensor, ...], cfg: float) -> torch.Tensor:
        import comfy.sample

        sampling = importlib.import_module("frugal.nodes.tryon.sigmas")
        x, person, garment, mask, noise = given
        glue = importlib.import_module("frugal.nodes.tryon.glue")
        # ComfyUI scales the latents of the conditioning itself.
        made = glue.assemble(person / SCALE, garment / SCALE, mask)
        sigmas, _ = sampling.reference_schedule(self.patcher, len(noise), 1.0)
        queue = iter(noise)
        sampler = sampling.DDIMSampler(
            1.0, noise_sampler=lambda *_: next(queue).to(self.patcher.load_device)
        )
        found = comfy.sample.sample_custom(
            self.patcher, x, cfg, sampler, sigmas, made[0], made[1], made[2]["samples"],
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return SCALE * found.float().cpu()


def resident(field: str) -> int:
    """Bytes of this process from /proc: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def worker(options: argparse.Namespace) -> None:
    """One contender: makes the model, then answers one line per command on its stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not come between the answers
    torch.set_num_threads(options.threads)
    side, _, kind = options.worker.partition(" ")
    cuda = options.device == "cuda"
    if side != "diffusers":
        enter(options.tree, cuda, side == "ours+torch")
    else:
        importlib.import_module("diffusers")
    if cuda:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
    before, began = 0 if cuda else resident("VmRSS"), time.perf_counter()
    with torch.inference_mode():
        model = (Diffusers if side == "diffusers" else Ours)(options.base, options, kind)
        print(json.dumps({"load_seconds": time.perf_counter() - began}), file=answers)
        given = start_of(options.size, options.batch, options.steps)
        for line in sys.stdin:
            command, _, path = line.strip().partition(" ")
            began = time.perf_counter()
            if command == "forward":
                x = torch.cat([given[0], given[3].repeat(1, 1, 2, 1), given[0]], 1)
                made = model.forward(x, 601)
            else:
                made = model.sample(given, options.cfg)
            seconds = time.perf_counter() - began
            torch.save(made, path)
            peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
            facts = {"seconds": seconds, "peak": peak, "weights": model.weight_bytes()}
            print(json.dumps(facts), file=answers)


def enter(tree: Path, cuda: bool, torch_attention: bool) -> None:
    harness.enter(tree)
    import comfy.cli_args

    # As --use-pytorch-cross-attention does.
    comfy.cli_args.args.use_pytorch_cross_attention = torch_attention
    if cuda:
        # The test setup asks for the CPU; this comes before ComfyUI looks for a device.
        comfy.cli_args.args.cpu = False
    importlib.import_module("frugal.nodes.tryon.sigmas")


def ask(process: subprocess.Popen, command: str = "") -> dict:
    if command:
        print(command, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with code {process.wait()}")
    return json.loads(line)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def measure(options: argparse.Namespace, folder: Path) -> dict:
    base = write_base(folder, options.width)
    rows: dict[str, dict] = {}
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name in options.contenders:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--base", base]
            processes[name] = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            rows[name] = ask(processes[name]) | {"taken": []}
        for kind in ("forward", *["sample"] * (1 + options.rounds)):
            for name, process in processes.items():
                facts = ask(process, f"{kind} {folder / f'{name}-{kind}.pt'}")
                if kind == "sample":
                    rows[name]["taken"].append(facts["seconds"])
                rows[name] |= {"peak_bytes": facts["peak"], "weight_bytes": facts["weights"]}
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    first = options.contenders[0]
    for name, row in rows.items():
        # The first turn warms up caches and kernels.
        seconds = [taken / options.steps for taken in row.pop("taken")[1:]]
        row["seconds_per_step"] = round(median(seconds), 4)
        row["rounds"] = [round(value, 4) for value in seconds]
        row["load_seconds"] = round(row["load_seconds"], 2)
        for kind in ("forward", "sample"):
            made, want = (torch.load(folder / f"{who}-{kind}.pt") for who in (name, first))
            row[f"{kind}_error"] = float(f"{relative(made, want):.3e}")
    return rows


def machine(options: argparse.Namespace) -> dict:
    device = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    elif info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        device = names[0].partition(":")[2].strip() if names else device
    import diffusers

    return {
        "device": f"{device}, {os.cpu_count()} logical cores, {platform.system()}",
        "commit": harness.commit(),
        "comfyui": options.tree.name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("tree", type=Path)
    options.add_argument("--size", type=size, default=(128, 192))
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--cfg", type=float, default=2.5)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--contenders",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=["diffusers fp32", "ours fp32", "ours int8"],
    )
    options.add_argument("--width", type=int, default=320)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--note", default="")
    options.add_argument("--out", type=Path, default=harness.RESULTS / "catvton.json")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        return worker(chosen)
    torch.set_num_threads(chosen.threads)
    settings = ("size", "batch", "cfg", "steps", "width", "threads", "note")
    report = machine(chosen) | {name: getattr(chosen, name) for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        report["rows"] = measure(chosen, Path(folder))
    harness.write(chosen.out, report)
    print(json.dumps(report["rows"], indent=1))
    return None


if __name__ == "__main__":
    main()
