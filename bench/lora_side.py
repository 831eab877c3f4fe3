"""Two stacked LoRAs on a quantised Wan: beside the layers, merged by ComfyUI, and bypassed by it.

`python bench/lora_side.py TREE RESULT.json` for each ComfyUI, then `python bench/lora_side.py
--table RESULT.json ...`. A random-weight Wan (width 512, 2 blocks, 512 tokens; LoRAs of rank 16
on every layer of the blocks) gives the relative error of the network's output against (a) the
unquantised model with both LoRAs in its weights, which is what a user wants, and (b) the
dequantised weights with both LoRAs, which is what a LoRA can do without touching them. Seconds are
the median of turns that take each way once, as a ratio to the quantised model without a LoRA.
Random weights rank formats and expose what is left out; they say nothing of picture quality.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

TURNS = 3
RANK = 16
STRENGTHS = (0.8, 0.6)
QUANTISED = ("int8 ConvRot", "W4A8")
WAYS = ("no LoRA", "merged", "bypassed", "beside")


def measure(tree: Path, out: Path) -> None:
    harness.enter(tree)
    import torch

    logging.disable(logging.CRITICAL)
    rows = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        bench = Bench(Path(folder))
        for label in bench.formats():
            rows[label] = bench.row(label)
            print(label, json.dumps(rows[label]), flush=True)
    result = {
        "tree": tree.name,
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "rank": RANK,
        "rows": rows,
    }
    harness.write(out, result)


class Bench:
    """The model of the bench in every format, its LoRAs, and ways to apply them."""

    def __init__(self, folder: Path):
        from frugal.kernels.checkpoints.wan_shapes import WanConfig
        from frugal.tests.helpers import lora as lora_bed
        from frugal.tests.helpers import wan as bed

        self.bed, self.side, self.folder = bed, lora_bed, folder
        self.config = WanConfig(dim=512, ffn_dim=1024, layers=2, in_dim=16, out_dim=16)
        self.source = bed.weights(self.config)
        self.layers = bed.block_linears(self.source, self.config)
        lora_bed.RANK = RANK
        self.loras, self.dense = [], []
        for seed in (1, 2):
            tensors, dense = self.lora(seed)
            self.loras.append(tensors)
            self.dense.append(dense)

    def lora(self, seed: int) -> tuple[dict, dict]:
        """A LoRA a fifth as large as the weights, as trained ones are small beside them."""
        import torch

        tensors, dense = {}, {}
        for number, layer in enumerate(self.layers):
            shape = self.source[f"{layer}.weight"].shape
            up, down = self.side.factors(shape, 1000 * seed + number, RANK)
            up = torch.mul(up, 0.2)
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
            dense[layer] = up @ down
        return tensors, dense

    def formats(self) -> list[str]:
        import comfy.quant_ops

        known = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
        found = ["bf16", "fp8 per tensor", "GPTQ 4 bits"]
        return found + (list(QUANTISED) if "asym_w4a8_int8" in known else [])

    def load(self, label: str):
        import torch

        from frugal.nodes.wan import load_run

        bed = self.bed
        made = {
            "bf16": lambda: (bed.base(self.source)[0], {}),
            "fp8 per tensor": lambda: bed.scaled(
                self.source, bed.E4, marker=torch.zeros(2).to(bed.E4), config=self.config
            )[:2],
            "GPTQ 4 bits": lambda: bed.gptq_or_awq(self.source, self.config)[:2],
        }
        tensors, metadata = made.get(label, lambda: (self.source, {}))()
        path = bed.write(self.folder / "wan.safetensors", tensors, metadata)
        choice = label if label in QUANTISED else load_run.AS_STORED
        return load_run.load_wan(path, quantize=choice)[0]

    def apply(self, way: str, model):
        """The model with both LoRAs; None where this ComfyUI has no such way."""
        import comfy.sd

        if way == "bypassed" and not hasattr(comfy.sd, "load_bypass_lora_for_models"):
            return None
        for tensors, strength in zip(self.loras, STRENGTHS, strict=True):
            if way == "merged":
                model = comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]
            elif way == "bypassed":
                model = comfy.sd.load_bypass_lora_for_models(
                    model, None, dict(tensors), strength, 0.0
                )[0]
            elif way == "beside":
                model = self.side.put(model, self.folder, tensors, strength)[0]
        return model

    def output(self, model):
        import comfy.model_management
        import torch

        models = [model, *model.get_nested_additional_models()]
        comfy.model_management.load_models_gpu(models)
        make = torch.Generator().manual_seed(3)
        x = torch.randn(1, 16, 2, 32, 32, generator=make)
        context = torch.randn(1, 64, self.config.text_dim, generator=make)
        started = time.perf_counter()
        found = model.model.apply_model(
            x,
            torch.tensor([0.6]),
            c_crossattn=context,
            transformer_options={"wrappers": model.wrappers},
        )
        return (x - found) / 0.6, time.perf_counter() - started

    def reference(self, weights):
        import comfy.sd
        import torch

        changes = list(zip(self.dense, STRENGTHS, strict=True))
        model = comfy.sd.load_diffusion_model_state_dict(
            self.side.with_changes(weights, *changes), model_options={"dtype": torch.float32}
        )
        return self.output(model)[0]

    def row(self, label: str) -> dict[str, dict[str, float] | None]:
        import comfy.model_management

        from frugal.tests.helpers.wan_checks import loaded_weights

        base = self.load(label)
        wanted, possible = self.reference(self.source), self.reference(loaded_weights(base))
        found: dict[str, dict[str, float] | None] = {}
        seconds: dict[str, list[float]] = {}
        models = {way: self.apply(way, base) for way in WAYS}
        for turn in range(TURNS + 1):
            for way, model in models.items():
                if model is None:
                    found[way] = None
                    continue
                if turn == 0 or way == "merged":
                    comfy.model_management.unload_all_models()
                out, _ = self.output(model)
                if turn == 0:
                    found[way] = {
                        "error": self.bed.relative(out, wanted),
                        "error of the LoRA": self.bed.relative(out, possible),
                    }
                else:
                    # The first call after another model was loaded pays for more than itself.
                    seconds.setdefault(way, []).append(self.output(model)[1])
        plain = statistics.median(seconds["no LoRA"])
        for way, times in seconds.items():
            found[way]["seconds"] = statistics.median(times)  # type: ignore[index]
            found[way]["ratio"] = statistics.median(times) / plain  # type: ignore[index]
        comfy.model_management.unload_all_models()
        return found


def table(*files: str) -> str:
    lines = ["| ComfyUI | format | " + " | ".join(WAYS) + " | time, merged | time, beside |"]
    lines.append("|---|---|" + "---|" * (len(WAYS) + 2))
    for file in files:
        result = json.loads(Path(file).read_text("utf-8"))
        version = result["tree"].rpartition("-")[2]
        for label, row in result["rows"].items():
            cells = ["absent" if row[way] is None else f"{row[way]['error']:.4f}" for way in WAYS]
            cells += [f"{row[way]['ratio']:.2f}" for way in ("merged", "beside")]
            lines.append(f"| {version} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(*sys.argv[2:]))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
