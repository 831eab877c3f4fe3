"""Two nodes and an address that `gpu` adds to the ComfyUI server it measures; not part of the pack.

`FrugalBenchClock` takes the time of every step and the memory of every sampling run of the MODEL
that goes through it, with the device waited for at both ends. `FrugalBenchEnd` ends a graph behind
a latent. GET /frugal_bench gives what was seen since the last time, and what the server is.

Memory is read in three ways that do not know of each other: torch's own peak, the bytes of weights
in the reservations of dynamic VRAM (which torch does not count), and the most that the driver had
given away on the whole card, asked 20 times a second.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import comfy.model_management
import torch
from aiohttp import web
from comfy.patcher_extension import WrappersMP
from server import PromptServer

KEY = "frugal.bench"
EVERY = 0.05
runs: list[dict[str, Any]] = []


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def now() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize(device())
    return time.perf_counter()


def dynamic() -> bool:
    return bool(getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False))


def reserved(model: Any) -> int:
    """Bytes of weights that dynamic VRAM has on the card for a ModelPatcher, 0 without it."""
    if not dynamic():
        return 0
    held = getattr(model.model, "dynamic_vbars", {})
    return sum(int(each.loaded_size()) for each in held.values())


class Watch:
    """Reads memory beside a sampling run."""

    def __init__(self, model: Any):
        self.model, self.used, self.weights, self.before = model, 0, 0, 0
        self.over = threading.Event()
        self.cuda = device().type == "cuda"

    def read(self) -> None:
        free, total = torch.cuda.mem_get_info(device())
        self.used = max(self.used, total - free)
        self.weights = max(self.weights, reserved(self.model))

    def _loop(self) -> None:
        while not self.over.wait(EVERY):
            self.read()

    def __enter__(self) -> Watch:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device())
            self.before = torch.cuda.memory_allocated(device())
            self.thread = threading.Thread(target=self._loop, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.over.set()
            self.thread.join()
            self.read()

    def found(self) -> dict[str, int]:
        if not self.cuda:
            return {}
        return {
            "torch_before": self.before,
            "torch_peak": torch.cuda.max_memory_allocated(device()),
            "dynamic_vram_peak": self.weights,
            "card_used_peak": self.used,
        }


def timed(model: Any, label: str) -> Any:
    """A clone of the ModelPatcher whose runs and steps are noted under `label`."""
    model = model.clone()

    def run(executor, *args, **kwargs):
        row: dict[str, Any] = {"label": label, "steps": []}
        runs.append(row)
        start = now()
        with Watch(model) as watch:
            try:
                return executor(*args, **kwargs)
            finally:
                row["seconds"] = now() - start
                row |= watch.found()

    def step(executor, *args, **kwargs):
        start = now()
        made = executor(*args, **kwargs)
        runs[-1]["steps"].append(now() - start)
        return made

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, step)
    return model


class Clock:
    CATEGORY, FUNCTION, RETURN_TYPES = "bench", "execute", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "label": ("STRING", {"default": ""})}}

    def execute(self, model, label):
        return (timed(model, label),)


class End:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "bench", "execute", (), True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"latent": ("LATENT",)}}

    def execute(self, latent):
        whole = bool(torch.isfinite(latent["samples"]).all())
        return {"ui": {"frugal_bench_finite": (whole,)}}


NODE_CLASS_MAPPINGS = {"FrugalBenchClock": Clock, "FrugalBenchEnd": End}


@PromptServer.instance.routes.get("/frugal_bench")
async def seen(_: web.Request) -> web.Response:
    taken, runs[:] = list(runs), []
    return web.json_response({"dynamic_vram": dynamic(), "device": str(device()), "runs": taken})
