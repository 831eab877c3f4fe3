"""Hulls, boxes and smoothing over time against scikit-image and definitions, on both backends."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure, morphology

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks import dispatch
from frugal.kernels.masks.refine import HULLS, RefineSettings, boxes, hull, refine

SIDES = [1, 2, 63, 64, 65, 129]
BACKENDS = ["numba", "scipy"]
few = settings(max_examples=30, deadline=None, derandomize=True)
backends = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def shapes(draw) -> np.ndarray:
    """Masks of awkward sizes, bool: blobs, sparse pixels, empty, full."""
    height, width = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["blobs", "blobs", "sparse", "empty", "full"]))
    if kind == "blobs":
        noise = ndimage.gaussian_filter(rng.random((height, width)), draw(st.sampled_from([1, 3])))
        return noise > np.quantile(noise, draw(st.sampled_from([0.5, 0.8, 0.97])))
    if kind == "sparse":
        return rng.random((height, width)) < 0.02
    return np.full((height, width), kind == "full")


def run(bits: np.ndarray, whole: bool, backend: str) -> np.ndarray:
    if backend == "numba":
        assert dispatch.backend() == "numba", "the tests need numba"
    frames = bits.astype(np.float32)[None]
    return dispatch.run_hull(frames, 0.5, whole, threads=1, use_numba=backend == "numba")[0] > 0


def convex(bits: np.ndarray) -> np.ndarray:
    """scikit-image's hull of pixel centres, which needs three points not on one line."""
    points = np.argwhere(bits)
    if len(points) < 3 or np.linalg.matrix_rank(points[1:] - points[0]) < 2:
        out = bits.copy()
        if len(points) > 1:
            (y0, x0), (y1, x1) = points[0], points[-1]
            steps = np.gcd(y1 - y0, x1 - x0)
            for n in range(steps + 1):
                out[y0 + (y1 - y0) // steps * n, x0 + (x1 - x0) // steps * n] = True
        return out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return morphology.convex_hull_image(bits, offset_coordinates=False)


@backends
@few
@given(bits=shapes())
def test_hull_of_all_equals_skimage(backend, bits):
    assert np.array_equal(run(bits, True, backend), convex(bits))


@backends
@few
@given(bits=shapes())
def test_hull_of_each_region_equals_skimage(backend, bits):
    labels = measure.label(bits, connectivity=2)
    expected = np.zeros_like(bits)
    for n in range(1, labels.max() + 1):
        expected |= convex(labels == n)
    assert np.array_equal(run(bits, False, backend), expected)


@few
@given(bits=shapes(), whole=st.booleans())
def test_hull_grows_is_idempotent_and_keeps_when_turned(bits, whole):
    once = run(bits, whole, "numba")
    assert (bits <= once).all()
    assert np.array_equal(run(np.ascontiguousarray(bits.T), whole, "numba"), once.T)
    if whole:
        assert np.array_equal(run(once, True, "numba"), once)


@pytest.mark.parametrize("radius", [1, 4, 9])
def test_closing_equals_scipy(radius):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((2, 90, 70)), (0, 3, 3))
    bits = noise > 0.51
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = y * y + x * x <= radius * radius
    for n, result in enumerate(hull(bits.astype(np.float32), "closing", radius)):
        grown = ndimage.binary_dilation(bits[n], disk)
        assert np.array_equal(result > 0, ndimage.binary_erosion(grown, disk, border_value=1))


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("mode", HULLS)
def test_the_number_of_threads_changes_no_bit(mode, threads):
    clip = np.random.default_rng(1).random((7, 65, 64), np.float32)
    clip = ndimage.gaussian_filter(clip, (0, 2, 2))
    alone = hull(clip, mode, 3, threshold=0.52, threads=1)
    assert 0 < alone.mean() < 1
    assert np.array_equal(hull(clip, mode, 3, threshold=0.52, threads=threads), alone)


def test_input_stays_and_two_dimensions_do():
    mask = np.random.default_rng(0).random((40, 50))
    kept = mask.copy()
    assert hull(mask, "per_region", threshold=0.9).shape == (1, 40, 50)
    assert np.array_equal(mask, kept)
    assert hull(np.empty((0, 4, 5), np.float32), "whole").shape == (0, 4, 5)


@pytest.mark.parametrize("changes", [dict(mode="box"), dict(mode="closing", radius=0),
                                     dict(mode="closing", radius=513),
                                     dict(mode="whole", threshold=2.0)])  # fmt: skip
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(FrugalError, match="expected"):
        hull(np.zeros((4, 4), np.float32), **changes)


def test_boxes_are_those_of_each_frame():
    clip = np.zeros((4, 40, 50), np.float32)
    clip[1, 3:9, 5:6] = 0.1
    clip[2, 39, 49] = 1
    clip[3, 10:20, 10:30] = np.nan
    assert boxes(clip).tolist() == [[0, 0, 0, 0], [5, 3, 1, 6], [49, 39, 1, 1], [0, 0, 0, 0]]


@backends
def test_ema_both_ways_does_not_lag(backend):
    """A clip and its mirror image in time give nearly mirrored results; plain ema does not."""
    clip = np.zeros((40, 3, 5), np.float32)
    clip[20:] = 1
    chosen = RefineSettings(threshold=0, temporal="ema_both", temporal_strength=0.6)
    result = dispatch.run_chain(clip, chosen, threads=1, use_numba=backend == "numba")
    assert np.abs(result + result[::-1] - 1)[5:-5, 0, 0].max() < 0.01
    once = refine(clip, RefineSettings(threshold=0, temporal="ema", temporal_strength=0.6))
    assert np.abs(once + once[::-1] - 1)[5:-5, 0, 0].max() > 0.3
    expected = once.astype(np.float64)
    for t in range(38, -1, -1):
        expected[t] = 0.6 * expected[t + 1] + 0.4 * expected[t]
    assert np.abs(result - expected).max() < 1e-6


@pytest.mark.parametrize("chosen", [dict(grow=5), dict(grow=-4, grow_shape="square"),
                                    dict(fill_holes=-1, drop_islands=9), dict(feather=3.0)],
                         ids=str)  # fmt: skip
def test_a_hard_mask_is_the_same_with_and_without_threshold(chosen, monkeypatch):
    """Masks of 0 and 1 take the fast path of bits where grey values are to be kept."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).random((65, 130)), 2)
    mask = (noise > 0.5).astype(np.float32)
    mask[noise > 0.58] = np.nan
    mode = dict(feather_mode="gaussian")
    fast = refine(mask, RefineSettings(threshold=0, **mode, **chosen))
    monkeypatch.setattr(dispatch.numba_chain().bits, "is_hard", lambda frame: False)
    grey = refine(mask, RefineSettings(threshold=0, **mode, **chosen))
    assert np.abs(fast - grey).max() <= (1e-5 if "feather" in chosen else 0)
