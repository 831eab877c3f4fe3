"""What making CatVTON's UNet takes before its weights arrive: memory and seconds.

    python bench/catvton_build.py       writes bench/results/catvton-build.json

The real structure (width 320) from shapes alone, through the loader's own steps up to the empty
model, fp16, in a ComfyUI on the CPU (FRUGAL_COMFYUI_TREE, or the oldest one that dev.py has
installed). This is what a construction on the meta device would save. Linux only.
"""

from __future__ import annotations

import json
import time

import catvton
import harness
import torch

RESULTS = harness.RESULTS / "catvton-build.json"


def main() -> None:
    comfyui = harness.enter().TREE
    if comfyui is None:
        raise SystemExit("set FRUGAL_COMFYUI_TREE to a ComfyUI folder")
    from diffusers import UNet2DConditionModel

    from frugal.nodes.tryon import load_run
    from frugal.nodes.tryon.unet import CatVTONConfig

    with torch.device("meta"):
        shapes = UNet2DConditionModel(**catvton.structure(320)).state_dict()
    tensors, config = load_run.canonical_unet(shapes, "the shapes")
    model_config = CatVTONConfig(config)
    model_config.unet_config["num_heads"] = 8
    model_config.set_inference_dtype(torch.float16, torch.float32)
    before, began = catvton.resident("RssAnon"), time.perf_counter()
    model = model_config.get_model(tensors, "")
    seconds = time.perf_counter() - began
    grown = catvton.resident("RssAnon") - before
    weights = sum(p.numel() * p.element_size() for p in model.diffusion_model.parameters())
    report = {
        "comfyui": comfyui.name,
        "torch": torch.__version__,
        "weight_bytes": weights,
        "resident_bytes": grown,
        "seconds": round(seconds, 2),
    }
    harness.write(RESULTS, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
