"""The demo's command on a person's own photos: what goes into the graph is what they see."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from frugal.demo import real_size


class Started(Exception):  # noqa: N818
    """The server would start now."""


def refuse(*_, **__):
    raise Started


def test_phone_photos_go_in_upright(tmp_path, monkeypatch):
    """EXIF orientation 6: person, mask and garment lie on their side in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    given = {}
    for seed, name in enumerate(("person", "mask", "garment")):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        given[name] = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(given[name], exif=exif)
    monkeypatch.setattr(real_size, "missing", lambda *_: [])
    monkeypatch.setattr(real_size, "ComfyServer", refuse)
    with pytest.raises(Started):
        real_size.run_real(
            tmp_path, tmp_path, given["person"], given["garment"], given["mask"], tmp_path
        )
    for name, file in (("person", "person"), ("garment", "garment"), ("mask", "person_mask")):
        with Image.open(tmp_path / "inputs" / f"{file}.png") as made:
            wanted = ImageOps.exif_transpose(Image.open(given[name]))
            wanted = wanted.convert("L") if name == "mask" else wanted
            assert made.size == (30, 40)
            # What is written is upright already: a reader that turns it turns nothing.
            turned = np.asarray(ImageOps.exif_transpose(made).convert(wanted.mode))
            assert np.array_equal(turned, np.asarray(wanted))
