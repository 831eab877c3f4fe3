"""Photo to label map to cloth mask on a real server, with a parser in its models folder."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from frugal.kernels.masks.labels import ATR
from frugal.tests.helpers.parsers import save_parser

pytestmark = pytest.mark.comfy


def test_a_photo_becomes_labels_and_a_mask(server, tmp_path):
    pytest.importorskip("transformers")
    save_parser(server.models / "human_parsing" / "tiny_parser", ATR)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "parse_photo.png")
    photo = server.upload(tmp_path / "parse_photo.png")
    offered = server.object_info(fresh=True)["FrugalHumanParse"]["input"]["required"]["parser"]
    assert "tiny_parser" in str(offered)
    nodes = {
        "photo": ("LoadImage", {"image": photo}),
        "parse": ("FrugalHumanParse", {"image": ["photo", 0], "parser": "tiny_parser"}),
        "mask": ("FrugalMaskFromLabels", {
            "labels": ["parse", 0], "map": "ATR", "parts": "0-17", "encoding": "grey level",
        }),
        "cloth": ("FrugalClothMask", {
            "atr": ["parse", 0], "part": "upper", "hull": "per_region", "radius": 16,
            "dilate": 0, "blur": 0,
        }),
        "save": ("SaveImage", {"images": ["parse", 0], "filename_prefix": "parse/labels"}),
    }  # fmt: skip
    result = server.run({k: {"class_type": c, "inputs": i} for k, (c, i) in nodes.items()})
    assert result.status == "success", result.errors
    entry = next(found for node, found in result.files() if node == "save")
    saved = np.asarray(Image.open(io.BytesIO(server.view(**entry))).convert("RGB"))
    assert saved.shape == pixels.shape and saved.max() < len(ATR)
    assert len(np.unique(saved)) > 2, "one label everywhere would prove nothing"
    assert result.outputs["cloth"]["images"] and result.outputs["mask"]["images"]
