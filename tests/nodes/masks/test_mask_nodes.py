"""The mask node inside ComfyUI: schema, devices and dtypes, parity with core, a run on a real
server.
"""

from __future__ import annotations

import importlib
import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.kernels.errors import FrugalError
from frugal.nodes import _preview
from frugal.nodes.masks.nodes import FrugalMaskRefine

NEUTRAL = {
    "threshold": 0.5,
    "fill_holes": 0,
    "drop_islands": 0,
    "keep_largest": 0,
    "grow": 0,
    "grow_shape": "disk",
    "feather": 0.0,
    "feather_mode": "ramp_out",
    "temporal": "off",
    "temporal_strength": 0.5,
}


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """Text the node shows; there is no server to show it on."""
    texts = []
    monkeypatch.setattr("frugal.nodes.masks.nodes.show_text", lambda _, text: texts.append(text))
    return texts


@pytest.fixture
def node():
    """The class as the server prepares it: a clone with its hidden inputs set."""
    return FrugalMaskRefine.PREPARE_CLASS_CLONE({})


def execute(node, mask, **settings):
    return node.execute(mask=mask, **NEUTRAL | settings)


def soft_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def core_grow(mask, expand, tapered):
    core = importlib.import_module("comfy_extras.nodes_mask").GrowMask
    grown = core().expand_mask(mask, expand, tapered)
    return grown[0] if isinstance(grown, tuple) else grown.result[0]


def test_schema_inputs_are_the_settings():
    inputs = [i.id for i in FrugalMaskRefine.define_schema().inputs]
    assert inputs == ["mask", *NEUTRAL]
    defaults = {i.id: i.default for i in FrugalMaskRefine.define_schema().inputs[1:]}
    assert defaults == NEUTRAL


@pytest.mark.parametrize(("shape", "tapered"), [("diamond", True), ("square", False)])
@pytest.mark.parametrize("expand", [-4, -1, 3, 9])
def test_grow_equals_core_grow_mask_bit_for_bit(node, shape, tapered, expand):
    mask = soft_mask(2, 37, 70)
    ours = execute(node, mask, threshold=0.0, grow=expand, grow_shape=shape)[0]
    assert torch.equal(ours, core_grow(mask, expand, tapered))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), (1, 40, 30), (3, 40, 30)])
def test_any_float_dtype_and_2d_or_3d(node, dtype, shape):
    mask = soft_mask(*shape).to(dtype)
    kept = mask.clone()
    refined, inverted, *box = execute(node, mask, grow=2).args
    assert refined.dtype == inverted.dtype == torch.float32
    assert refined.shape == (shape[0] if len(shape) == 3 else 1, *shape[-2:])
    assert torch.equal(mask, kept)
    assert torch.equal(refined + inverted, torch.ones_like(refined))
    assert all(isinstance(value, int) for value in box)


def test_a_mask_view_that_is_not_contiguous(node):
    mask = soft_mask(3, 30, 40).transpose(1, 2)
    plain = execute(node, mask.contiguous(), feather=3.0)[0]
    assert torch.equal(execute(node, mask, feather=3.0)[0], plain)


def test_box_is_the_union_over_frames(node, shown):
    mask = torch.zeros(2, 50, 60)
    mask[0, 10, 20], mask[1, 30, 45] = 1, 1
    assert execute(node, mask).args[2:] == (20, 10, 26, 21)
    assert "box x 20, y 10, 26 x 21 px" in shown[-1]
    assert execute(node, torch.zeros(2, 50, 60)).args[2:] == (0, 0, 0, 0)
    assert "the mask is empty" in shown[-1]


def test_an_image_is_refused_by_name(node):
    with pytest.raises(FrugalError, match=r"connect a MASK.*shape \[1, 8, 8, 3\]"):
        execute(node, torch.zeros(1, 8, 8, 3))


def test_a_ramp_on_grey_values_is_refused(node):
    with pytest.raises(FrugalError, match=r"hard edge"):
        execute(node, torch.zeros(1, 8, 8), threshold=0.0, feather=4.0)


def test_preview_is_few_frames_and_holds_both_ends():
    mask = torch.arange(81.0).reshape(81, 1, 1)
    assert _preview.small(mask).flatten().tolist() == [0, 27, 53, 80]
    assert len(_preview.small(mask[:3])) == 3


def test_preview_is_small_and_shows_the_middle_of_what_it_leaves_out():
    y, x = torch.meshgrid(torch.arange(3000.0), torch.arange(4000.0), indexing="ij")
    shown = _preview.small((y * 4000 + x)[None])[0]
    assert max(shown.shape) <= _preview.LONGEST and shown.shape == (273, 364)
    assert shown[0, 0] == 5 * 4000 + 5
    assert _preview.small(torch.zeros(1, 100, 300)).shape == (1, 100, 300)


@pytest.mark.parametrize("client", [None, "page"])
def test_preview_is_written_only_where_somebody_looks(node, monkeypatch, tmp_path, client):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    looking = types.SimpleNamespace(client_id=client)
    running = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=looking))
    monkeypatch.setitem(sys.modules, "server", running)
    result = execute(node, soft_mask(9, 900, 500))
    files = sorted(tmp_path.rglob("*.png"))
    if client is None:
        assert not files and result.ui is None
        return
    assert len(files) == _preview.FRAMES == len(result.ui.as_dict()["images"])
    with Image.open(files[0]) as picture:
        assert max(picture.size) == 300


def test_cancel_stops_the_work(node, monkeypatch):
    class Cancelled(BaseException):
        pass

    def hook(value, total, preview, node_id=None):
        raise Cancelled

    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_ENABLED", True)
    with pytest.raises(Cancelled):
        execute(node, soft_mask(40, 64, 64), grow=3)


def test_progress_reaches_the_number_of_frames(node, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "comfy.utils.PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    execute(node, soft_mask(40, 32, 32), grow=3, temporal="median3")
    assert seen[-1] == (40, 40)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.comfy
def test_on_a_server(server):
    graph = {
        "1": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 32, "height": 48}},
        "2": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 96, "height": 80}},
        "3": {
            "class_type": "MaskComposite",
            "inputs": {
                "destination": ["2", 0], "source": ["1", 0], "x": 20, "y": 16, "operation": "add",
            },
        },
        "4": {
            "class_type": "FrugalMaskRefine",
            "inputs": {"mask": ["3", 0]} | NEUTRAL | {"grow": 4, "grow_shape": "square"},
        },
        "5": {"class_type": "MaskToImage", "inputs": {"mask": ["4", 0]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }  # fmt: skip
    result = server.run(graph)
    assert result.status == "success", result.errors
    assert "images" in result.outputs["4"], "no preview on the node"
    expected = np.zeros((80, 96), np.uint8)
    expected[12:68, 16:56] = 255
    saved = next(entry for node_id, entry in result.files() if node_id == "6")
    picture = Image.open(io.BytesIO(server.view(**saved))).convert("L")
    assert np.array_equal(np.asarray(picture), expected)
