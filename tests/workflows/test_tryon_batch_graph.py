"""The shipped batch graph with the demo's models: four pictures, each the one it should be."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from frugal.demo import batch_graph
from frugal.demo.data import held_out_swap
from frugal.demo.figures import render_person
from frugal.demo.layout import MODELS, WORKFLOWS
from frugal.demo.sheet import psnr

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def prompt(server, tmp_path_factory):
    shutil.copytree(MODELS, server.models, dirs_exist_ok=True)
    for path in batch_graph.draw_into(tmp_path_factory.mktemp("figures")):
        assert server.upload(path) == path.name
    server.object_info(fresh=True)
    return server.convert(json.loads((WORKFLOWS / "tryon_batch.json").read_text()))


def pictures(server, prompt):
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    (text,) = (o["text"][0] for o in result.outputs.values() if "text" in o and "encoded" in str(o))
    saved = [server.view(**file) for _, file in result.files() if file["type"] == "output"]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in saved], text


def test_every_figure_wears_every_garment(server, prompt):
    made, text = pictures(server, prompt)
    assert len(made) == 4 and "encoded 2 persons and 2 garments" in text
    drawn, swaps = batch_graph.pictures(), [held_out_swap(i) for i in (1, 2)]
    truths = {(p, g): render_person(swaps[p][0], swaps[g][2])[0] for p in (0, 1) for g in (0, 1)}
    for number, picture in enumerate(made):
        person, garment = divmod(number, 2)
        before = drawn[batch_graph.FIGURES[person]]
        mask = drawn[batch_graph.MASKS[person]][..., 0] > 0
        np.testing.assert_array_equal(picture[~mask], before[~mask])
        right = psnr(picture, truths[person, garment], mask)
        wrong = psnr(picture, truths[person, 1 - garment], mask)
        assert right > 14 and right > wrong + 3, (number, right, wrong)
