"""The mask graph end to end: a real photo, a moving mask, pixels outside the masks untouched."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from frugal.demo import mask_graph
from frugal.demo.layout import WORKFLOWS
from frugal.kernels.masks.refine import RefineSettings, refine

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def made(server, tmp_path_factory):
    """(photo, clip) as saved by the graph: uint8 [512, 512, 3] and [12, 512, 512, 3]."""
    pytest.importorskip("skimage")
    for path in mask_graph.write_inputs(tmp_path_factory.mktemp("masks")):
        assert server.upload(path) == path.name
    server.object_info(fresh=True)
    graph = json.loads((WORKFLOWS / "masks.json").read_text(encoding="utf-8"))
    prompt = server.convert(graph)
    result = server.run(prompt)
    assert result.status == "success", result.errors
    saved: dict[str, list[np.ndarray]] = {}
    for node, entry in result.files():
        if entry["type"] == "output":
            picture = Image.open(io.BytesIO(server.view(**entry))).convert("RGB")
            prefix = prompt[node]["inputs"]["filename_prefix"]
            saved.setdefault(prefix, []).append(np.asarray(picture))
    for node, shown in prompt.items():
        if shown["class_type"].startswith("Frugal"):
            assert result.outputs[node]["images"], f"{shown['class_type']} shows no preview"
    (photo,) = saved["frugal/masks_photo"]
    return photo, np.stack(saved["frugal/masks_clip"])


def test_the_photo_changes_inside_its_refined_mask_only(made):
    before, rough = mask_graph.photo()
    chosen = RefineSettings(fill_holes=-1, drop_islands=200, grow=6, feather=10.0)
    mask = refine(rough.astype(np.float32) / 255, chosen)[0]
    assert 0.01 < (mask > 0).mean() < 0.6
    assert np.array_equal(made[0][mask == 0], before[mask == 0])
    full = mask == 1
    assert np.abs(made[0][full].astype(int) - (255 - before[full])).max() <= 1


def test_the_clip_is_put_back_exactly_and_lost_frames_are_repaired(made):
    before, _ = mask_graph.photo()
    masks = mask_graph.walk() > 0
    median = ndimage.median_filter(masks.astype(np.uint8), (3, 1, 1), mode="nearest") > 0
    assert len(made[1]) == mask_graph.FRAMES
    for t in range(mask_graph.FRAMES):
        changed = (made[1][t] != before).any(-1)
        filled = ndimage.binary_fill_holes(median[t])
        assert not (changed & ~filled).any(), t
        assert changed.sum() > 0.5 * filled.sum(), t
    assert not masks[mask_graph.LOST].any()
