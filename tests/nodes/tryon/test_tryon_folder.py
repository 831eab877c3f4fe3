"""Folders in, a folder out: what a shop has on its disk, and what is there after a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import batching
from frugal.nodes.tryon import delivery, folder, folder_run, picture_files

SIZE = (72, 60)  # of a photo: width, height


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(input, output) of this test; there is no server to show text on."""
    monkeypatch.setattr(folder, "show_text", lambda *_: None)
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path / "input", tmp_path / "output"


def draw(path: Path, size=SIZE, seed=0, mode="RGB", **options) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ).convert(mode)
    picture.save(path, **options)
    return picture


def paint(path: Path, size=SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[15:45, 20:50] = 255
    Image.fromarray(mask).save(path)


def shop(root: Path, persons: int, garments: int, size=SIZE) -> None:
    for i in range(persons):
        draw(root / "persons" / f"p{i}.jpg", size, i, quality=95)
        paint(root / "masks" / f"p{i}.png", size)
    for i in range(garments):
        draw(root / "garments" / f"g{i}.png", (40, 50), 100 + i)


def execute(bed, **changes):
    """(folder, report) of the node as the executor calls it."""
    given = {
        "persons": "persons", "garments": "garments", "masks": "masks",
        "combine": batching.ALL, "pairs_file": folder_run.NO_LIST, "subfolders": False,
        "width": 64, "height": 96, "fit": "crop around mask", "steps": 1, "cfg": 1.0, "eta": 1.0,
        "seed": 5, "mask_blur": 2, "memory_budget": 0.0, "largest_group": 4,
        "filename_prefix": "tryon/shop",
    } | changes  # fmt: skip
    prompt = {
        "7": {"class_type": "FrugalTryOnFolder", "inputs": {**given, "model": ["3", 0]}},
        "3": {"class_type": "FrugalLoadCatVTON", "inputs": {"base": "tiny"}},
    }
    hidden = {
        folder.io.Hidden.unique_id: "7",
        folder.io.Hidden.prompt: prompt,
        folder.io.Hidden.extra_pnginfo: {"workflow": {"nodes": [1]}},
    }
    node = folder.FrugalTryOnFolder.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    if node.hidden is None or node.hidden.prompt is None:  # other versions take them flat
        node = folder.FrugalTryOnFolder.PREPARE_CLASS_CLONE(hidden)
    assert node.hidden.prompt == prompt
    with torch.no_grad():
        made = node.execute(model=bed[0], vae=bed[1], **given)
    return made.args, made.ui


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.png"))


def test_twelve_pictures_with_their_names_graph_and_sheet(bed, places):
    root, output = places
    shop(root, 4, 3)
    (where, report), shown = execute(bed)
    assert where == "output/tryon/shop_00001_"
    there = output / "tryon" / "shop_00001_"
    assert names(output) == [f"p{p}__g{g}.png" for p in range(4) for g in range(3)]
    assert report.startswith(where) and "12 pictures" in report
    for p in range(4):
        photo = np.asarray(Image.open(root / "persons" / f"p{p}.jpg"))
        mask = np.asarray(Image.open(root / "masks" / f"p{p}.png")) > 127
        made = [np.asarray(Image.open(there / f"p{p}__g{g}.png")) for g in range(3)]
        for picture in made:
            assert np.array_equal(picture[~mask], photo[~mask])
            assert (picture[mask] != photo[mask]).any(axis=-1).mean() > 0.9
        assert not np.array_equal(made[0], made[1])
    info = Image.open(there / "p0__g0.png").text
    assert json.loads(info["prompt"])["7"]["inputs"]["seed"] == 5
    assert json.loads(info["workflow"]) == {"nodes": [1]}
    with Image.open(there / "contact_sheet_1.jpg") as sheet:
        assert sheet.size == (3 * 96, 4 * (128 + delivery.LABEL))
        # Where the pictures are it is not white.
        assert np.asarray(sheet.convert("L"))[10:70, 10:90].std() > 10
    assert (there / "report.txt").read_text("utf-8").strip() == report
    entry = {"filename": "contact_sheet_1.jpg", "subfolder": "tryon/shop_00001_", "type": "output"}
    assert shown == {"images": [entry]}


class Killed(BaseException):
    """What nothing catches: the process is gone."""


def test_a_run_that_was_killed_goes_on_where_it_was(bed, places, monkeypatch):
    root, output = places
    shop(root, 3, 2)
    whole = execute(bed, filename_prefix="whole/all")[0][0]
    wanted = {path.name: path.read_bytes() for path in (output / "whole").rglob("*.png")}
    plain = delivery.InFolder.add
    made = []

    def add(self, number, picture):
        if len(made) == stop_at:
            raise Killed
        made.append(number)
        plain(self, number, picture)

    monkeypatch.setattr(delivery.InFolder, "add", add)
    for stop_at in (2, 5):
        with pytest.raises(Killed):
            execute(bed)
        assert len(names(output / "tryon")) == stop_at
    stop_at = 99
    (where, report), _ = execute(bed)
    assert made == list(range(6)) and where == "output/tryon/shop_00001_"
    assert "1 pictures" in report and "5 more were there before" in report
    found = {path.name: path for path in (output / "tryon").rglob("*.png")}
    assert found.keys() == wanted.keys() and whole != where
    for name, path in found.items():
        one, other = (np.asarray(Image.open(each)) for each in (path, _written(output, name)))
        assert np.abs(one.astype(int) - other).max() <= 1, name
    # Nothing left to do; another speed is the same run, another seed is another.
    made.clear()
    assert "0 pictures" in execute(bed, largest_group=1)[0][1] and not made
    assert execute(bed, seed=6)[0][0] == "output/tryon/shop_00002_" and len(made) == 6
    # A photo that was changed since is made again, and only that.
    made.clear()
    time = (output / "tryon" / "shop_00001_" / "p1__g0.png").stat().st_mtime + 5
    os.utime(root / "persons" / "p1.jpg", (time, time))
    execute(bed)
    assert made == [2, 3]


def _written(output: Path, name: str) -> Path:
    [path] = (output / "whole").rglob(name)
    return path


def test_a_cancel_stops_at_the_next_picture_and_keeps_what_is_made(bed, places, monkeypatch):
    root, output = places
    shop(root, 3, 2)
    management, plain = comfy.model_management, delivery.InFolder.add
    made = []

    def cancelled(self, *args):
        plain(self, *args)
        made.append(args)
        management.interrupt_current_processing()

    monkeypatch.setattr(delivery.InFolder, "add", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        execute(bed)
    assert made and len(names(output)) == len(made) < 6
    monkeypatch.setattr(delivery.InFolder, "add", plain)
    execute(bed)
    assert len(names(output)) == 6


def test_bad_files_are_named_and_the_others_are_made(bed, places):
    root, output = places
    shop(root, 4, 2)
    (root / "persons" / "p1.jpg").write_bytes(b"no picture")
    (root / "masks" / "p2.png").unlink()
    Image.new("L", SIZE).save(root / "masks" / "p3.png")
    (root / "garments" / "g1.png").write_bytes((root / "garments" / "g1.png").read_bytes()[:200])
    (_, report), _ = execute(bed)
    assert names(output) == ["p0__g0.png"]
    lines = [line for line in report.splitlines() if line.startswith("not made: ")]
    assert len(lines) == 4 and "1 pictures" in report
    for said in ("p1.jpg cannot be read", "no mask for p2.jpg", "paint over", "g1.png cannot be"):
        assert any(said in line for line in lines), said
    shop(root / "none", 1, 1)
    (root / "none" / "masks" / "p0.png").unlink()
    draw(root / "none" / "masks" / "other.png")
    with pytest.raises(FrugalError, match=r"none of the 1 pictures .* p0__g0"):
        execute(bed, persons="none/persons", garments="none/garments", masks="none/masks")


def test_a_list_says_who_wears_what(bed, places):
    root, output = places
    shop(root, 3, 3)
    (root / "day.csv").write_text(
        "person;garment\np2.jpg;g0\nP0;g2.png\n\nnobody;g1\np2;g0.png\n", encoding="utf-8-sig"
    )
    assert folder_run.lists() == [folder_run.NO_LIST, "day.csv"]
    (_, report), _ = execute(bed, pairs_file="day.csv")
    assert names(output) == ["p0__g2.png", "p2__g0.png"]
    assert "line 5 of day.csv: no such person or garment: nobody, g1" in report
    (root / "empty.csv").write_text("person,garment\n", encoding="utf-8")
    with pytest.raises(FrugalError, match=r"no line of input/empty\.csv"):
        execute(bed, pairs_file="empty.csv")
    with pytest.raises(FrugalError, match="no list"):
        execute(bed, pairs_file="../day.csv")


def test_erased_clothes_are_the_mask_and_keep_their_colours(bed, places):
    root, output = places
    shop(root, 1, 1)
    photo = draw(root / "photos" / "a.png", seed=3).convert("RGBA")
    alpha = np.full(SIZE[::-1], 255, np.uint8)
    alpha[15:45, 20:50] = 0
    photo.putalpha(Image.fromarray(alpha))
    photo.save(root / "photos" / "a.png")
    draw(root / "photos" / "plain.jpg")
    (_, report), _ = execute(bed, persons="photos", masks=folder_run.ERASED)
    assert names(output) == ["a__g0.png"] and "plain.jpg has no transparent part" in report
    made = np.asarray(Image.open(next(output.rglob("a__g0.png"))))
    assert np.array_equal(made[alpha > 0], np.asarray(photo)[..., :3][alpha > 0])


def test_memory_does_not_grow_with_the_number_of_pictures(bed, places, monkeypatch):
    """Photos of 12 MB each as floats: over 36 pictures the slope is below 1 MB each. Held results
    would show as 12, held masks as 2.
    """
    root, _ = places
    shop(root, 18, 2, (1000, 1000))
    process, seen, plain = psutil.Process(), [], delivery.InFolder.add

    def add(self, number, picture):
        plain(self, number, picture)
        seen.append(process.memory_info().rss / 2**20)

    monkeypatch.setattr(delivery.InFolder, "add", add)
    execute(bed)
    assert len(seen) == 36
    late = np.array(seen[8:])
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    assert slope < 1, f"{slope:.2f} MB per picture: {seen}"


def test_phone_photos_stand_upright(places):
    """EXIF orientation 6 and 3, against Pillow's own turn, in every node that reads folders."""
    root, _ = places
    for name, orientation in (("a", 6), ("b", 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        draw(root / "phone" / f"{name}.jpg", exif=exif, quality=95)
    images, masks, found, _ = load("phone")
    assert found == ["a", "b"]
    assert images[0].shape == (1, SIZE[0], SIZE[1], 3) and images[1].shape == (1, *SIZE[::-1], 3)
    for name, image in zip(found, images, strict=True):
        upright = ImageOps.exif_transpose(Image.open(root / "phone" / f"{name}.jpg"))
        assert np.array_equal((image[0] * 255).round().byte().numpy(), np.asarray(upright))
    assert not masks[0].any() and masks[0].shape == images[0].shape[:3]


def load(name: str, white: bool = True, subfolders: bool = False):
    node = folder.FrugalLoadPictures.PREPARE_CLASS_CLONE(None)
    return node.execute(name, white, subfolders).args


def test_every_kind_of_file_a_shop_has(places):
    root, _ = places
    for name in ("img10.png", "img2.PNG", "img1.jpg", "Img3.webp"):
        draw(root / "mixed" / name)
    clear = Image.fromarray(np.zeros((40, 30, 4), np.uint8))
    clear.save(root / "mixed" / "img4.png")
    Image.fromarray(np.full((40, 30), 65535 // 2, np.uint16)).save(root / "mixed" / "img5.png")
    draw(root / "mixed" / "img6.png", mode="P")
    draw(root / "mixed" / "img6.jpg")
    draw(root / "mixed" / "sub" / "deep.png")
    (root / "mixed" / "notes.txt").write_text("no picture")
    (root / "mixed" / "img7.png").write_bytes(b"broken")
    images, masks, found, report = load("mixed")
    assert found == ["img1", "img2", "Img3", "img4", "img5", "img6.jpg", "img6.png", "img10"]
    assert "left out: " in report and "img7.png" in report
    by_name = dict(zip(found, zip(images, masks, strict=True), strict=True))
    assert by_name["img4"][0].min() == 1 and by_name["img4"][1].min() == 1
    assert torch.allclose(by_name["img5"][0], torch.tensor(0.5), atol=1e-4)
    assert load("mixed", white=False)[0][3].max() == 0
    assert load("mixed", subfolders=True)[2][-1] == "sub-deep"


def test_only_folders_below_the_input_folder_are_read(places, tmp_path):
    root, _ = places
    draw(tmp_path / "secret" / "x.png")
    draw(root / "fine" / "x.png")
    assert picture_files.folders() == ["fine"]
    for name in ("../secret", str(tmp_path / "secret"), ".", "nothing"):
        with pytest.raises(FrugalError, match="below ComfyUI's input folder"):
            load(name)
        assert folder.FrugalLoadPictures.validate_inputs(folder=name) is not True
    assert folder.FrugalLoadPictures.validate_inputs(folder="fine") is True
    (root / "void").mkdir()
    with pytest.raises(FrugalError, match="has no pictures"):
        load("void")
