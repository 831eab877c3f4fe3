"""The mask nodes of one step each inside ComfyUI: devices, parity with core, preview, a server."""

from __future__ import annotations

import importlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.bench.mask_scenes import person_maps
from frugal.kernels.errors import FrugalError
from frugal.kernels.masks import labels
from frugal.nodes.masks.nodes import NODES

BY_ID = {node.GET_SCHEMA().node_id: node for node in NODES}


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """Text the nodes show; there is no server to show it on, so somebody has to seem to look."""
    texts = []
    monkeypatch.setattr("frugal.nodes._preview.watched", lambda: True)
    for module in ("nodes", "edit", "people", "pictures"):
        monkeypatch.setattr(
            f"frugal.nodes.masks.{module}.show_text", lambda _, text: texts.append(text)
        )
    return texts


def run(node_id: str, **inputs):
    """Outputs and ui of a node with its defaults, as the server prepares it."""
    node = BY_ID[node_id].PREPARE_CLASS_CLONE({})
    defaults = {
        i.id: i.default
        for i in BY_ID[node_id].define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    return node.execute(**defaults | inputs)


def clip(frames: int = 3) -> torch.Tensor:
    """Soft blobs with a hole and a speck in every frame."""
    noise = torch.rand((frames, 9, 12), generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(noise[:, None], (72, 96), mode="bicubic")[:, 0]
    mask = (3 * wide - 1).clamp(0, 1)
    mask[:, :30, :30] = 1
    mask[:, 10:13, 10:13], mask[:, 40:60, 40:60] = 0, 0
    mask[:, 50, 50] = 1
    return mask


def image(frames: int = 3, size=(72, 96), seed: int = 1) -> torch.Tensor:
    return torch.rand((frames, *size, 3), generator=torch.Generator().manual_seed(seed))


EDITS = ("FrugalMaskGrow", "FrugalMaskFeather", "FrugalMaskClean", "FrugalMaskHull",
         "FrugalMaskTemporal")  # fmt: skip


@pytest.mark.parametrize("node_id", EDITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_edits_take_any_mask_and_leave_it_alone(node_id, dtype):
    mask = clip().to(dtype)
    kept = mask.clone()
    result = run(node_id, mask=mask)
    assert result.args[0].shape == mask.shape and result.args[0].dtype == torch.float32
    assert not torch.equal(result.args[0], mask.float())
    assert torch.equal(mask, kept)
    assert len(result.ui.as_dict()["images"]) == 3
    turned = run(node_id, mask=mask.transpose(1, 2)).args[0]
    assert turned.shape == (3, 96, 72)
    assert run(node_id, mask=mask[0]).args[0].shape == (1, 72, 96)


def test_grow_keeps_grey_and_equals_core():
    mask = clip()
    grow = importlib.import_module("comfy_extras.nodes_mask").GrowMask()
    for shape, tapered in (("diamond", True), ("square", False)):
        for pixels in (5, -3):
            core = grow.expand_mask(mask, pixels, tapered)
            core = core[0] if isinstance(core, tuple) else core.result[0]
            ours = run("FrugalMaskGrow", mask=mask, grow=pixels, grow_shape=shape).args
            assert torch.equal(ours[0], core)
            assert torch.equal(ours[1], 1 - core)


def test_clean_counts_what_is_left(shown):
    mask = torch.zeros(2, 40, 40)
    mask[0, 2:12, 2:12], mask[0, 20:30, 20:30], mask[0, 35, 5] = 1, 0.5, 1
    mask[1, 5:15, 5:15] = 1
    cleaned, count = run("FrugalMaskClean", mask=mask).args
    assert count == 3 and "regions: 2 1" in shown[-1]
    assert cleaned[0, 35, 5] == 0 and cleaned[0, 25, 25] == 0.5
    assert run("FrugalMaskClean", mask=mask, drop_islands=0).args[1] == 4


def test_queueing_a_mask_node_starts_the_warm_up(monkeypatch):
    started = []
    monkeypatch.setattr("frugal.kernels.masks.warm.start", lambda: started.append(1))
    without = [i for i, node in BY_ID.items() if "validate_inputs" not in vars(node)]
    assert without == ["FrugalMaskFromLabels"], "it runs no kernel"
    for node_id in BY_ID.keys() - set(without):
        assert BY_ID[node_id].validate_inputs() is True
    assert len(started) == len(BY_ID) - 1


def test_temporal_offers_no_off_and_smooths():
    modes = BY_ID["FrugalMaskTemporal"].define_schema().inputs[1].options
    assert "off" not in modes and len(modes) == 5
    flicker = torch.zeros(9, 8, 8)
    flicker[4] = 1
    assert run("FrugalMaskTemporal", mask=flicker, mode="median3").args[0].max() == 0
    assert run("FrugalMaskTemporal", mask=flicker, mode="union").args[0].min() == 1


def test_composite_equals_core():
    core = importlib.import_module("comfy_extras.nodes_mask").ImageCompositeMasked()
    below, above, mask = image(3, (80, 100)), image(3, seed=2), clip()
    for x, y in ((0, 0), (7, 5)):
        expected = core.execute if hasattr(core, "execute") else core.composite
        made = expected(below, above, x, y, False, mask)
        made = made[0] if isinstance(made, tuple) else made.result[0]
        ours = run("FrugalMaskComposite", destination=below, source=above, mask=mask, x=x, y=y)
        assert (ours.args[0] - made).abs().max() <= 2e-7
        assert len(ours.ui.as_dict()["images"]) == 3


def test_crop_and_uncrop_through_the_nodes(shown):
    picture, mask = image(5), torch.zeros(5, 72, 96)
    for t in range(5):
        mask[t, 20 + t : 30 + t, 10 * t : 10 * t + 12] = 1
    cut, cut_mask, window, width, height = run("FrugalMaskBBoxCrop", image=picture, mask=mask).args
    assert cut.shape == (5, height, width, 3) and cut_mask.shape == (5, height, width)
    assert width % 16 == height % 16 == 0
    assert "window 16 x 16 px" in shown[-1]
    back = run("FrugalMaskBBoxUncrop", destination=picture, cropped=cut, window=window).args[0]
    assert torch.equal(back, picture)
    masked = run(
        "FrugalMaskBBoxUncrop", destination=picture, cropped=1 - cut, window=window, mask=cut_mask
    ).args[0]
    assert torch.equal(masked[mask == 0], picture[mask == 0])
    assert torch.equal(masked[mask == 1], 1 - picture[mask == 1])
    larger = cut.repeat_interleave(2, 1).repeat_interleave(2, 2)
    again = run("FrugalMaskBBoxUncrop", destination=picture, cropped=larger, window=window).args[0]
    assert (again - picture).abs().mean() < 0.1
    assert "resized 32 x 32 to 16 x 16 px" in shown[-1]
    with pytest.raises(FrugalError, match="cropped"):
        run("FrugalMaskBBoxUncrop", destination=picture[:, :64], cropped=cut, window=window)


def as_image(numbers: np.ndarray, table: np.ndarray | None = None) -> torch.Tensor:
    levels = np.repeat(numbers[..., None], 3, -1) if table is None else table[numbers]
    return torch.from_numpy(levels.astype(np.float32) / 255)[None]


def test_agnostic_mask_from_any_encoding(shown):
    dense, lip, atr = person_maps(128, 96, 0)
    grey = run("FrugalClothMask", densepose=as_image(dense), lip=as_image(lip), atr=as_image(atr))
    coloured = run(
        "FrugalClothMask",
        densepose=as_image(dense, labels._hex(labels.VIRIDIS)),
        lip=as_image(lip, labels.voc_palette(20)),
        atr=as_image(atr, labels.voc_palette(18)),
    )
    assert torch.equal(grey.args[0], coloured.args[0])
    assert 0.05 < grey.args[0].mean() < 0.9
    assert "DensePose read as viridis" in shown[-1]
    run("FrugalClothMask", atr=as_image(atr))
    assert "hands and feet are not protected" in shown[-1]
    with pytest.raises(FrugalError, match="no parsing map"):
        run("FrugalClothMask", densepose=as_image(dense))


def test_a_coat_on_an_atr_map_is_told(shown, caplog):
    maps = person_maps(128, 96, 2, coat=True)
    lip, atr = (torch.from_numpy(m / np.float32(255))[None, ..., None] for m in maps[1:])
    run("FrugalClothMask", part="outer", atr=atr)
    assert "no class for coats" in shown[-1] and "no class for coats" in caplog.text
    caplog.clear()
    run("FrugalClothMask", part="outer", atr=atr, lip=lip)
    run("FrugalClothMask", part="upper", atr=atr)
    assert "coats" not in shown[-1] + shown[-2] + caplog.text


def test_an_unpainted_picture_says_where_to_paint():
    """Load Image gives 64 x 64 zeros beside a picture without alpha."""
    unpainted = torch.zeros(1, 64, 64)
    for given in (
        dict(node_id="FrugalMaskComposite", destination=image(1), source=image(1), mask=unpainted),
        dict(node_id="FrugalMaskBBoxCrop", image=image(1), mask=unpainted),
    ):
        with pytest.raises(FrugalError, match=r"^paint the mask"):
            run(**given)


def test_masks_with_a_channel_axis_and_pictures_with_alpha_are_taken():
    mask = clip()
    for node_id in EDITS:
        plain, channel = (run(node_id, mask=m).args[0] for m in (mask, mask[:, None]))
        assert torch.equal(plain, channel), node_id
    rgba = torch.cat([image(), torch.ones(3, 72, 96, 1)], dim=-1)
    taken = run("FrugalMaskComposite", destination=image(seed=2), source=rgba, mask=mask[:, None])
    plain = run("FrugalMaskComposite", destination=image(seed=2), source=image(), mask=mask)
    assert torch.equal(taken.args[0], plain.args[0])


def test_mask_from_labels_names_what_it_read(shown):
    _, _, atr = person_maps(128, 96, 0)
    shirt = labels.ATR.index("Upper-clothes")
    made = run("FrugalMaskFromLabels", labels=as_image(atr, labels.voc_palette(18))).args[0]
    assert np.array_equal(made[0].numpy() > 0, atr == shirt)
    assert "read as VOC colours, labels 4, 7" in shown[-1]
    with pytest.raises(FrugalError, match="Upper-clothes"):
        run("FrugalMaskFromLabels", labels=as_image(atr), parts="shirt")


@pytest.mark.parametrize("node_id", [*EDITS, "FrugalMaskComposite"])
def test_cancel_stops_the_work(node_id, monkeypatch):
    class Cancelled(BaseException):
        pass

    def hook(value, total, preview, node_id=None):
        raise Cancelled

    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_ENABLED", True)
    inputs = {"mask": clip()}
    if node_id == "FrugalMaskComposite":
        inputs |= {"destination": image(), "source": image()}
    with pytest.raises(Cancelled):
        run(node_id, **inputs)


@pytest.mark.comfy
def test_crop_edit_uncrop_on_a_server(server, tmp_path):
    """A moving window through a real server: outside the mask the picture comes back as it was."""
    picture = (image(1)[0].numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "scene.png")
    spot = np.zeros((72, 96), np.uint8)
    spot[30:44, 50:70] = 255
    Image.fromarray(spot).save(tmp_path / "spot.png")
    scene = server.upload(tmp_path / "scene.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": scene}},
        "2": {
            "class_type": "LoadImageMask",
            "inputs": {"image": server.upload(tmp_path / "spot.png"), "channel": "red"},
        },
        "3": {
            "class_type": "FrugalMaskBBoxCrop",
            "inputs": {
                "image": ["1", 0], "mask": ["2", 0], "context": 1.2, "multiple_of": 16,
                "mode": "follow", "smoothing": 4.0,
            },
        },
        "4": {"class_type": "ImageInvert", "inputs": {"image": ["3", 0]}},
        "5": {
            "class_type": "FrugalMaskBBoxUncrop",
            "inputs": {
                "destination": ["1", 0], "cropped": ["4", 0], "window": ["3", 2], "mask": ["3", 1],
            },
        },
        "6": {
            "class_type": "SaveImage",
            "inputs": {"images": ["5", 0], "filename_prefix": "masks/uncrop"},
        },
    }  # fmt: skip
    result = server.run(graph)
    assert result.status == "success", result.errors
    assert "images" in result.outputs["3"] and "images" in result.outputs["5"]
    saved = next(entry for node_id, entry in result.files() if node_id == "6")
    made = np.asarray(Image.open(io.BytesIO(server.view(**saved))).convert("RGB"))
    assert np.array_equal(made[spot == 0], picture[spot == 0])
    assert np.abs(made[spot > 0].astype(int) - (255 - picture[spot > 0])).max() <= 1
