"""The committed demo model does what its card says, on swaps it was never trained on."""

from __future__ import annotations

import pytest

from frugal.demo import export
from frugal.demo.evaluate import evaluate
from frugal.demo.layout import MODELS

# `python -m demo.evaluate` measures 64 for demo/figures.json, which takes minutes.
SWAPS = 24


@pytest.fixture(scope="module")
def figures():
    return evaluate(*export.read(), swaps=SWAPS, steps=10)[0]


def test_the_right_garment_is_the_nearest_of_sixteen(figures):
    assert figures["swaps"] == SWAPS
    assert figures["retrieval_of_16"] >= 0.8


def test_it_beats_the_garments_mean_colour(figures):
    psnr = figures["masked_psnr_db"]
    assert psnr["result"] >= psnr["mean_color"] + 2
    assert psnr["codec"] > psnr["result"]


def test_files_are_small_and_labelled():
    from safetensors import safe_open

    files = sorted(MODELS.rglob("*.safetensors"))
    assert len(files) == 3
    assert all(path.stat().st_size <= 16e6 for path in files)
    assert sum(path.stat().st_size for path in files) <= 40e6
    for path in files:
        with safe_open(path, "pt") as handle:
            assert handle.metadata()["frugal.label"] == "drawn figures, not photos"
