"""What makes the mask kernels fast changes no result: strips, curves at borders, large pages, the
inverse of the same pass.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import ndimage

from frugal.kernels.masks import dispatch, pages
from frugal.kernels.masks.refine import RefineSettings, refine, refine_both
from frugal.kernels.masks.settings import box_widths
from frugal.tests.helpers.masks import blobs

CHAINS = (
    dict(fill_holes=40, grow=5, feather=9.0),
    dict(drop_islands=9, feather=9.0, feather_mode="gaussian"),
    dict(threshold=0.0, feather=4.0, feather_mode="gaussian", grow=3),
    dict(threshold=0.0, temporal="ema"),
)


def run(mask: np.ndarray, **changes) -> np.ndarray:
    assert dispatch.backend() == "numba", "the tests need numba"
    return refine(mask, RefineSettings(**changes), threads=1)


@pytest.mark.parametrize("sigma", [2.0, 12.0, 40.0])
def test_strips_of_a_wide_picture_change_no_bit(sigma, monkeypatch):
    picture = blobs(90, 400, 2, 6.0)
    chosen = dict(grow=3, feather=sigma, feather_mode="gaussian")
    whole = run(picture, **chosen)
    monkeypatch.setattr(dispatch.numba_chain(), "STRIP", 70)
    assert np.array_equal(run(picture, **chosen), whole)


@pytest.mark.parametrize("start", [0, 1, 5, 33, 34, 35, 170])
@pytest.mark.parametrize("length", [1, 30, 34, 69, 500])
def test_gaussian_near_the_border_repeats_before_each_filter(start, length):
    """Reach 34 px at this sigma: steps nearer to a side than that are not the steps inside."""
    mask = np.zeros((3, 240), np.float32)
    mask[:, start : start + length] = 1
    for picture in (mask, mask[:, ::-1].copy(), mask.T.copy()):
        expected = picture.astype(np.float64)
        for width in box_widths(12.0):
            expected = ndimage.uniform_filter(expected, width, mode="nearest")
        result = run(picture, feather=12.0, feather_mode="gaussian")[0]
        assert np.abs(result - expected).max() <= 1e-6


@pytest.mark.parametrize("backend", ["numba", "scipy"])
@pytest.mark.parametrize("split", [False, True])
def test_the_inverse_of_the_same_pass_is_one_minus_the_mask(backend, split, monkeypatch):
    monkeypatch.setattr(dispatch, "SPLIT_FROM", 1 if split else 2**40)
    clip = np.stack([blobs(70, 90, s) for s in range(1 if split else 5)])
    for chosen in CHAINS:
        settings, inverse = RefineSettings(**chosen), np.full(clip.shape, 7, np.float32)
        made = dispatch.run_chain(
            clip, settings, threads=2, use_numba=backend == "numba", inverse=inverse
        )
        assert np.array_equal(inverse, 1 - made), chosen
    refined, inverse = refine_both(clip, settings)
    assert np.array_equal(refined, refine(clip, settings))
    assert np.array_equal(inverse, 1 - refined)
    assert [a.shape for a in refine_both(clip[:0], settings)] == [(0, 70, 90)] * 2


@pytest.mark.parametrize(
    "shape", [(1,), (0, 9, 9), (1, 600, 700), (3, 1024, 768), (2, 999, 777, 3)]
)
def test_fresh_arrays_are_apart_whole_and_writable(shape):
    first, second = pages.fresh(shape), pages.fresh(shape)
    first[...], second[...] = 1, 2
    assert first.shape == shape
    assert first.dtype == np.float32
    assert first.flags.c_contiguous
    assert (first == 1).all()
    if sys.platform == "linux" and first.nbytes >= pages.FROM:
        assert first.ctypes.data % pages.PAGE == 0
