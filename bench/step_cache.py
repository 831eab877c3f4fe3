"""The step cache, ComfyUI's EasyCache and fewer steps, by the number of model calls.

    python bench/step_cache.py COMFYUI_FOLDER RESULT.json [--figures 12] [--steps 30]

"flow": relative error against all 50 steps on twelve flows whose velocity is known in closed form
(tests/helpers/flows.py; EasyCache there is its rule, which a test compares with the node).
Each cache gets the threshold, by bisection, that makes most calls of at most the given number.
"tryon": the demo's trained try-on network in ComfyUI, euler, cfg 2.5, for held-out figures. Each
cache is run at a few thresholds, and beside each run as few steps as it made calls: the peak
signal-to-noise ratio of the decoded picture inside the mask against the run with all steps, in dB.
"summary" has the median and the worst of all figures; no figure is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from statistics import median

import harness

CFG, SEED, FLOW_STEPS, FLOWS = 2.5, 5, 50, 12
OURS = (0.02, 0.05, 0.12)
EASY = (0.05, 0.1, 0.2)
# Model calls of at most, and most steps in a row without one.
BUDGETS = ((26, 3), (19, 5))


def enter(tree: str) -> None:
    """The pack as `frugal`, and the ComfyUI to import from."""
    harness.enter(tree)
    logging.disable(logging.CRITICAL)


def flows() -> dict:
    """Calls -> way -> relative error of each flow."""
    from frugal.kernels.sampling.step_cache import StepCache, StepCacheSettings
    from frugal.tests.helpers import flows as bed

    steps = FLOW_STEPS
    start, end = bed.percent(0.15), bed.percent(0.95)

    def run(flow, denoise):
        flow.calls = 0
        result = bed.euler(denoise, flow.noise, bed.levels(steps))
        return flow.calls, result

    def ours(flow, threshold, max_skips):
        sigmas = tuple(bed.levels(steps))
        cache = StepCache(StepCacheSettings(threshold, start, end, max_skips, sigmas))
        return run(flow, lambda x, t: cache.evaluate([0], x, t, lambda: [flow(x, t)])[0])

    def easy(flow, threshold, _):
        return run(flow, bed.EasyCacheRule(flow, threshold, start, end))

    table = {}
    for calls, skips in BUDGETS:
        rows = table[calls] = {"step cache": [], "EasyCache rule": [], "fewer steps": []}
        for seed in range(FLOWS):
            flow = bed.MixtureFlow(seed)
            full = bed.euler(flow, flow.noise, bed.levels(steps))
            for way, make, top in (("step cache", ours, 1.0), ("EasyCache rule", easy, 3.0)):
                _, result = bed.at_calls(lambda t, m=make, f=flow, n=skips: m(f, t, n), calls, top)
                rows[way].append(bed.relative(result, full))
            uniform = bed.euler(flow, flow.noise, bed.levels(calls))
            rows["fewer steps"].append(bed.relative(uniform, full))
    return table


class TryOn:
    """One figure of the demo: sampling it in several ways, and looking at the result."""

    def __init__(self, model, vae, number: int, steps: int):
        import numpy as np
        import torch

        from frugal.demo.data import held_out_swap
        from frugal.demo.figures import render_garment, render_person
        from frugal.nodes.tryon import glue

        person, own, garment = held_out_swap(number)
        before, mask = render_person(person, own)
        self.model, self.vae, self.steps, self.hole = model, vae, steps, mask

        def picture(pixels):
            return torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 255)[None]

        hole = torch.from_numpy((mask > 0).astype(np.float32))[None]
        self.positive, self.negative, self.latent = glue.conditioning(
            picture(before), picture(render_garment(garment)), hole, vae
        )
        self.full = self.picture(self.sample(model, steps))

    def sample(self, model, steps, cfg=CFG):
        import comfy.sample

        start = self.latent["samples"]
        noise = comfy.sample.prepare_noise(start, SEED)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", self.positive, self.negative, start,
            disable_pbar=True, seed=SEED,
        )  # fmt: skip

    def picture(self, samples):
        from frugal.nodes.tryon import glue

        return glue.decode({"samples": samples}, self.vae, self.hole.shape)[0].numpy() * 255

    def psnr(self, samples) -> float:
        from frugal.demo.sheet import psnr

        return psnr(self.picture(samples), self.full, self.hole)


def counted(model):
    """(clone, list that grows with each evaluation of the first prompt)."""
    from comfy.patcher_extension import WrappersMP

    seen: list[float] = []

    def wrapper(executor, x, timestep, *args, **kwargs):
        seen.append(float(timestep.flatten()[0]))
        return executor(x, timestep, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bench.count", wrapper)
    return clone, seen


def with_easycache(model, threshold):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0]


def with_ours(model, threshold):
    from frugal.nodes.sampling import step_cache_run

    return step_cache_run.apply(model, step_cache_run.Options(threshold), lambda report: None)


def row(figure, put, threshold) -> dict:
    """What a cache made of one figure, and what as few steps make of it."""
    # The counter is the innermost wrapper of the network, so it sees what a cache lets through.
    clone, seen = counted(put(figure.model, threshold))
    result = figure.sample(clone, figure.steps)
    calls = len(set(seen))
    fewer = figure.psnr(figure.sample(figure.model, calls))
    return {"calls": calls, "dB": round(figure.psnr(result), 2), "fewer steps dB": round(fewer, 2)}


def summary(found: list[dict]) -> dict:
    """Way and threshold -> median and extreme of all figures."""
    table = {}
    for way, thresholds in found[0].items():
        for threshold in thresholds:
            rows = [figure[way][threshold] for figure in found]
            table[f"{way}, threshold {threshold}"] = {
                "calls": [f([r["calls"] for r in rows]) for f in (median, min, max)],
                **{
                    name: [round(f([r[name] for r in rows]), 1) for f in (median, min)]
                    for name in ("dB", "fewer steps dB")
                },
            }
    return table


def tryon(figures: int, steps: int) -> list[dict]:
    """Of each figure the rows of each way."""
    import comfy.sd
    import comfy.utils

    from frugal.demo.layout import MODELS
    from frugal.nodes.tryon.load_run import load_catvton

    base = MODELS / "diffusion_models" / "frugal_demo_tryon_base.safetensors"
    attention = MODELS / "CatVTON" / "frugal_demo_tryon_attention.safetensors"
    codec = MODELS / "vae" / "frugal_demo_codec.safetensors"
    model = load_catvton(str(base), str(attention), "fp32")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(codec)))
    found = []
    for number in range(1, figures + 1):
        figure = TryOn(model, vae, number, steps)
        found.append(
            {
                "step cache": {str(at): row(figure, with_ours, at) for at in OURS},
                "EasyCache": {str(at): row(figure, with_easycache, at) for at in EASY},
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree")
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    enter(args.tree)
    import torch

    with torch.inference_mode():
        result = {
            "tree": Path(args.tree).name,
            "torch": torch.__version__,
            "device": "cpu",
            "steps": args.steps,
            "flow": flows(),
            "tryon": tryon(args.figures, args.steps),
        }
    result["summary"] = {
        "flow": {
            f"{calls} calls, {way}": [round(f(errors), 4) for f in (median, max)]
            for calls, table in result["flow"].items()
            for way, errors in table.items()
        },
        "tryon": summary(result["tryon"]),
    }
    harness.write(args.out, result)


if __name__ == "__main__":
    main()
