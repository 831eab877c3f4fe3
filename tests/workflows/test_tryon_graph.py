"""The shipped graph for photos, with the demo's models: a mask painted in ComfyUI's editor is where
the picture changes, and only there.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from frugal.demo import run as demo
from frugal.demo.layout import MODELS, WORKFLOWS
from frugal.demo.sheet import psnr
from frugal.demo.tryon_graph import DEMO
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy


def test_a_painted_photo_is_dressed(server, tmp_path):
    shutil.copytree(MODELS, server.models, dirs_exist_ok=True)
    before, mask, garment, truth = demo.swap(demo.SHOWN)
    # The editor makes transparent what was painted.
    painted = np.dstack([before, np.where(mask > 0, 0, 255).astype(np.uint8)])
    given = {
        "LoadImage": [
            {"image": demo.upload(server, tmp_path, "painted.png", painted)},
            {"image": demo.upload(server, tmp_path, "garment.png", garment)},
        ],
        "FrugalLoadCatVTON": [{"base": DEMO["base"], "attention": DEMO["attention"]}],
        "VAELoader": [{"vae_name": DEMO["vae"]}],
        "FrugalTryOn": [
            {"width": 128, "height": 192, "fit": "letterbox", "cfg": 1.0, "mask_blur": 0}
        ],
    }
    prompt = server.convert(json.loads((WORKFLOWS / "tryon_12gb.json").read_text("utf-8")))
    for node in prompt.values():
        if waiting := given.get(node["class_type"]):
            node["inputs"] |= waiting.pop(0)
    assert not any(given.values())
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    [key] = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    [dressed] = saved(server, result, key)
    assert np.array_equal(dressed[mask == 0], before[mask == 0])
    assert psnr(dressed, truth, mask) > psnr(before, truth, mask) + 3
