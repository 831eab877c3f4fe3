"""The parts of `gpu` that run graphs in a real ComfyUI server, dynamic VRAM on where it is the
default; each is a process of its own.

`python bench/gpu_graphs.py PART TREE RESULT.json FOLDER [--tiny]`. Files of random weights are made
on the card in FOLDER, under the public names; the graphs are those of `workflows/` as the tests
keep them in API form, with few steps. Left out are the text encoder and CLIP vision: their results
are stored. "native" is the same file, sampler and conditioning by ComfyUI's own nodes alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_files
import harness

GRAPHS = harness.ROOT / "tests" / "workflows" / "api"
DROPPED = ("FrugalCachedTextEncode", "CLIPVisionLoader", "CLIPVisionEncode", "PreviewImage")
# Nodes of ours that hand a model on -> the input that they take it from.
ON_THE_WAY = {
    "FrugalWanConstantContext": "wan_model",
    "FrugalMemoryPlan": "model",
    "FrugalAttention": "base_model",
}
NATIVE = "native"
# Part -> (graph, model of fit.WAN, format of the file, its name, budgets of the plan in GB, steps,
# whether the video is decoded in the last run). A budget of 0 is all that is free.
WAN = {
    "wan_14b_w4a8": ("wan_i2v_14b_12gb", "Wan 14B I2V", "W4A8", (0.0, 12.0), 2, True),
    "wan_14b_fp8": ("wan_i2v_14b_12gb", "Wan 14B I2V", "fp8", (0.0,), 2, False),
    "wan_14b_int8": ("wan_i2v_14b_12gb", "Wan 14B I2V", "int8 ConvRot", (0.0,), 2, False),
    "wan_1.3b": ("wan_t2v_1.3b", "Wan 1.3B T2V", "fp16", (0.0, 12.0), 3, True),
}
CATVTON = "catvton"
TRY_ON_STEPS, TINY = 4, {"width": 64, "height": 96}
PARTS = ("environment", CATVTON, *WAN)


class Result:
    """What a part has found so far, in its file after every addition."""

    def __init__(self, path: Path):
        self.path, self.held = path, {}

    def add(self, **found: Any) -> None:
        self.held |= found
        harness.write(self.path, self.held)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = work()
        taken = {name: round(time.perf_counter() - start, 2)}
        self.add(seconds=self.held.get("seconds", {}) | taken)
        return made


def environment(tree: Path) -> dict[str, Any]:
    """The card, its driver, torch and ComfyUI, without starting a server."""
    import importlib.metadata
    import platform

    import torch

    source = (tree / "comfyui_version.py").read_text("utf-8")
    comfyui = re.search(r"__version__ = \"(.*)\"", source)
    packages = ("comfy-kitchen", "comfy-aimdo", "triton", "triton-windows", "flash-attn",
                "flash-attn-3", "flash-attn-4", "sageattention", "xformers")  # fmt: skip
    found: dict[str, Any] = {
        "commit": harness.commit(),
        "comfyui": comfyui and comfyui[1],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": harness.cpu_name(),
        "packages": {name: version(importlib.metadata, name) for name in packages},
        # A torch without CUDA inside can only have a card that somebody pretends.
        "simulated": torch.cuda.is_available() and not torch.backends.cuda.is_built(),
        "driver": driver(),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory_total": total,
            "memory_free": free,
        }
    return found


def version(metadata: Any, name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def shipped(name: str) -> dict[str, Any]:
    return json.loads((GRAPHS / f"{name}.json").read_text("utf-8"))


def of_class(prompt: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [node for node in prompt.values() if node["class_type"] in kinds]


def clocked(prompt: dict[str, Any], kind: str, label: str) -> None:
    """Put the clock before the model input of the one node of this kind."""
    [node] = of_class(prompt, kind)
    inputs = {"model": node["inputs"]["model"], "label": label}
    prompt["clock"] = {"class_type": "FrugalBenchClock", "inputs": inputs}
    node["inputs"]["model"] = ["clock", 0]


def wan_graph(
    name: str, file: str, steps: int, budget: float, decode: bool, tiny: bool
) -> dict[str, Any]:
    """A shipped Wan graph with stored texts and few steps."""
    prompt = shipped(name)
    texts = [key for key, node in prompt.items() if node["class_type"] == "FrugalCachedTextEncode"]
    for kind in gpu_files.TEXT:
        embeds = {"embeds_name": f"{kind}.safetensors"}
        prompt[f"stored_{kind}"] = {"class_type": "FrugalLoadTextEmbeds", "inputs": embeds}
    for node in prompt.values():
        for at, link in node["inputs"].items():
            if isinstance(link, list) and link[0] in texts:
                node["inputs"][at] = [f"stored_{tuple(gpu_files.TEXT)[link[1]]}", 0]
    for node in of_class(prompt, "EmptyHunyuanLatentVideo", "WanImageToVideo"):
        node["inputs"].pop("clip_vision_output", None)
        node["inputs"] |= TINY | {"length": 9} if tiny else {}
    for node in of_class(prompt, "FrugalLoadWan"):
        node["inputs"]["model_name"] = file
    for node in of_class(prompt, "FrugalMemoryPlan"):
        node["inputs"]["budget_gb"] = budget
    for node in of_class(prompt, "FrugalSampler"):
        node["inputs"]["steps"] = steps
    if not decode:
        without_decode(prompt)
    clocked(prompt, "FrugalSampler", f"plan, {budget:g} GB" if budget else "plan, all that is free")
    return {key: node for key, node in prompt.items() if node["class_type"] not in DROPPED}


def without_decode(prompt: dict[str, Any]) -> None:
    for node in of_class(prompt, "FrugalWanDecodeToFile"):
        node["class_type"] = "FrugalBenchEnd"
        node["inputs"] = {"latent": node["inputs"]["samples"]}


def native_graph(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same graph by ComfyUI's own nodes, as far as the latent."""
    prompt = json.loads(json.dumps(prompt))
    without_decode(prompt)
    for node in prompt.values():
        for at, link in node["inputs"].items():
            while isinstance(link, list):
                behind = prompt[link[0]]
                through = ON_THE_WAY.get(behind["class_type"])
                # The plan's other outputs are reports.
                if through is None or link[1]:
                    break
                link = node["inputs"][at] = behind["inputs"][through]
    for node in of_class(prompt, "FrugalLoadWan"):
        node["class_type"] = "UNETLoader"
        name = node["inputs"]["model_name"]
        node["inputs"] = {"unet_name": name, "weight_dtype": "default"}
    for node in of_class(prompt, "FrugalSampler"):
        node["class_type"] = "KSampler"
        for extra in ("preset", "preview", "compile_blocks"):
            del node["inputs"][extra]
    prompt["clock"]["inputs"]["label"] = NATIVE
    return {key: node for key, node in prompt.items() if node["class_type"] not in ON_THE_WAY}


def seen(server: Any) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}/frugal_bench", timeout=60) as answer:
        return json.load(answer)


def measured(server: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """One run of a graph: the clock's rows, what the plan said, and how it ended."""
    result = server.run(prompt)
    row: dict[str, Any] = {"status": result.status, "graph_seconds": round(result.seconds, 2)}
    if result.errors:
        row["errors"] = result.errors
    for run in seen(server)["runs"]:
        row |= run
    later = row.get("steps", [])[1:]
    if later:
        # The first step moves weights and chooses kernels.
        row["seconds_per_step"] = statistics.median(later)
    for shown in result.outputs.values():
        if "frugal_memory_plan" in shown:
            row["plan"] = planned(json.loads(shown["frugal_memory_plan"][0]), row)
        if "frugal_bench_finite" in shown:
            row["finite"] = shown["frugal_bench_finite"][0]
    return row


def planned(plan: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What the memory plan foresaw of sampling, beside what was there."""
    kept = ("totals", "memory_options", "fits", "streamed", "budget", "budget_from", "notes")
    found = {name: plan[name] for name in kept if name in plan}
    phases = plan.get("totals", {}).items()
    predicted = max((size for name, size in phases if name.startswith("sampling")), default=0)
    if predicted and "torch_peak" in row:
        measured = row["torch_peak"] + row["dynamic_vram_peak"]
        found |= {"sampling_measured": measured, "measured_to_planned": measured / predicted}
    return found


def files(server: Any, model: str, tiny: bool, *more: str) -> None:
    command = [sys.executable, str(harness.ROOT / "bench" / "gpu_files.py"), model]
    command += [str(server.tree), str(server.models), *more, *(["--tiny"] if tiny else [])]
    subprocess.run(command, check=True)


def wan(part: str, server: Any, result: Result, tiny: bool) -> None:
    graph, name, target, budgets, steps, decode = WAN[part]
    file = f"{part}.safetensors"
    result.timed("files", lambda: files(server, name, tiny, "--file", file, "--format", target))
    size = (server.models / "diffusion_models" / file).stat().st_size
    result.add(model=name, format=target, file_bytes=size, rows=[])
    from frugal.demo.wan_graph import FIRST_FRAME

    gpu_files.picture(server.base / "input" / FIRST_FRAME, 480, 832, False)
    result.timed("server", server.start)
    result.add(server=seen(server))
    prompts = []
    for at, budget in enumerate(budgets):
        last = decode and at == len(budgets) - 1
        prompts.append(wan_graph(graph, file, steps, budget, last, tiny))
    for prompt in (native_graph(prompts[0]), *prompts):
        result.add(rows=[*result.held["rows"], measured(server, prompt)])
        server.free()


def catvton(server: Any, result: Result, tiny: bool) -> None:
    result.timed("files", lambda: files(server, CATVTON, tiny))
    size = TINY if tiny else {"width": 768, "height": 1024}
    for name in ("person", "garment"):
        path = server.base / "input" / f"{name}.png"
        gpu_files.picture(path, *size.values(), hole=name == "person")
    result.timed("server", server.start)
    result.add(server=seen(server), rows=[])
    for quantize in ("as stored", "int8", "fp8"):
        prompt = shipped("tryon_12gb")
        for node in of_class(prompt, "FrugalTryOn"):
            node["inputs"] |= size | {"steps": TRY_ON_STEPS, "fit": "letterbox"}
        for node in of_class(prompt, "FrugalLoadCatVTON"):
            node["inputs"]["quantize"] = quantize
        clocked(prompt, "FrugalTryOn", quantize)
        result.add(rows=[*result.held["rows"], measured(server, prompt)])
        server.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    result = Result(given.out)
    if given.part == "environment":
        harness.enter("none")
        result.add(**environment(given.tree))
        return
    harness.enter("none")
    import torch

    from frugal.demo.comfy_server import ComfyServer

    base = given.folder / given.part
    server = ComfyServer(given.tree, base, cpu=not torch.cuda.is_available())
    probe = base / "custom_nodes" / "frugal_bench_probe.py"
    probe.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("gpu_probe.py"), probe)
    try:
        if given.part == CATVTON:
            catvton(server, result, given.tiny)
        else:
            wan(given.part, server, result, given.tiny)
        # What stops a part leaves the server's last words in its log.
        bad = [row for row in result.held["rows"] if row["status"] != "success"]
        if bad:
            raise SystemExit("; ".join(error for row in bad for error in row.get("errors", ["?"])))
    except BaseException:
        print(server.log_tail(40), flush=True)
        raise
    finally:
        server.stop()
        shutil.rmtree(base / "models", ignore_errors=True)


if __name__ == "__main__":
    main()
