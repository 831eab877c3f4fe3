"""Mask refinement against SciPy and scikit-image, on both backends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure, morphology

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks import dispatch
from frugal.kernels.masks.refine import RefineSettings, bbox, invert, refine
from frugal.kernels.masks.settings import FEATHERS, SHAPES, TEMPORAL, box_widths
from frugal.tests.helpers.masks import blobs

CROSS = ndimage.generate_binary_structure(2, 1)
SIDES = [1, 2, 3, 63, 64, 65, 100, 129]
BACKENDS = ["numba", "scipy"]
few = settings(max_examples=40, deadline=None, derandomize=True)


def run(mask, backend: str = "numba", threads: int | None = 1, **changes) -> np.ndarray:
    if backend == "numba":
        assert dispatch.backend() == "numba", "the tests need numba"
    frames = np.ascontiguousarray(mask, np.float32).reshape((-1, *mask.shape[-2:]))
    chosen = RefineSettings(**changes)
    return dispatch.run_chain(frames, chosen, threads=threads, use_numba=backend == "numba")


@st.composite
def pictures(draw) -> np.ndarray:
    """Grey pictures of awkward sizes: noise, blobs, empty, full, one pixel."""
    height, width = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(["noise", "blobs", "blobs", "sparse", "empty", "full", "dot"]))
    if kind == "noise":
        return blobs(height, width, seed, 0.0)
    if kind == "blobs":
        return blobs(height, width, seed, draw(st.sampled_from([1.0, 2.0, 4.0])))
    picture = np.full((height, width), float(kind == "full"), np.float32)
    rng = np.random.default_rng(seed)
    if kind == "sparse":
        picture[rng.random((height, width)) < 0.02] = 1
    if kind == "dot":
        picture[rng.integers(height), rng.integers(width)] = 1
    return picture


def distance(target: np.ndarray) -> np.ndarray:
    return ndimage.distance_transform_edt(~target) if target.any() else np.full(target.shape, 1e9)


backends = pytest.mark.parametrize("backend", BACKENDS)


# Single steps against other people's code


@backends
@few
@given(picture=pictures(), level=st.floats(0.05, 1.0))
def test_threshold_is_strictly_above(backend, picture, level):
    expected = picture > np.float32(level)
    assert np.array_equal(run(picture, backend, threshold=level)[0], expected)


@backends
@few
@given(picture=pictures())
def test_fill_all_equals_binary_fill_holes(backend, picture):
    expected = ndimage.binary_fill_holes(picture > 0.5)
    assert np.array_equal(run(picture, backend, fill_holes=-1)[0], expected)


@backends
@few
@given(picture=pictures(), area=st.sampled_from([1, 2, 3, 5, 30]))
def test_fill_by_area_leaves_larger_holes_and_the_border(backend, picture, area):
    bits = picture > 0.5
    labels = measure.label(~bits, connectivity=1)
    expected = bits.copy()
    for region in measure.regionprops(labels):
        top, left, bottom, right = region.bbox
        enclosed = top > 0 and left > 0 and bottom < bits.shape[0] and right < bits.shape[1]
        if enclosed and region.area <= area:
            expected[labels == region.label] = True
    assert np.array_equal(run(picture, backend, fill_holes=area)[0], expected)


@backends
@few
@given(picture=pictures(), area=st.sampled_from([2, 3, 4, 5, 30]))
def test_drop_islands_equals_skimage(backend, picture, area):
    bits = picture > 0.5
    expected = morphology.remove_small_objects(bits, max_size=area - 1, connectivity=2)
    assert np.array_equal(run(picture, backend, drop_islands=area)[0], expected)


@backends
@few
@given(picture=pictures(), keep=st.integers(1, 5))
def test_keep_largest_keeps_the_largest(backend, picture, keep):
    bits = picture > 0.5
    labels = measure.label(bits, connectivity=2)
    areas = sorted((r.area for r in measure.regionprops(labels)), reverse=True)
    result = run(picture, backend, keep_largest=keep)[0] > 0
    kept = measure.regionprops(measure.label(result, connectivity=2))
    assert sorted((r.area for r in kept), reverse=True) == areas[:keep]
    assert all(bits[tuple(r.coords.T)].all() for r in kept)


@backends
@few
@given(picture=pictures(), level=st.sampled_from([0.0, 0.5, 0.9]))
def test_regions_are_counted_as_scipy_labels_them(backend, picture, level):
    frames = np.stack([picture, np.zeros_like(picture), np.ones_like(picture)])
    expected = [ndimage.label(frame > level, np.ones((3, 3)))[1] for frame in frames]
    assert expected[1:] == [0, 1]
    found = dispatch.run_count(frames, level, use_numba=backend == "numba")
    assert found.tolist() == expected


@backends
@few
@given(picture=pictures(), radius=st.sampled_from([1, 2, 5, 16, 63, 64, 65, 130]))
def test_disk_is_the_exact_euclidean_distance(backend, picture, radius):
    bits = picture > 0.5
    grown = np.round(distance(bits) ** 2) <= radius * radius
    shrunk = np.round(distance(~bits) ** 2) > radius * radius
    assert np.array_equal(run(picture, backend, grow=radius)[0], grown)
    assert np.array_equal(run(picture, backend, grow=-radius)[0], shrunk)


@backends
@few
@given(
    picture=pictures(),
    radius=st.integers(1, 9),
    shape=st.sampled_from(["diamond", "square"]),
    soft=st.booleans(),
    negative=st.booleans(),
)
def test_diamond_and_square_equal_repeated_3x3_steps(
    backend, picture, radius, shape, soft, negative
):
    """The rule of ComfyUI's Grow Mask: `radius` grey steps with a 3 x 3 footprint."""
    footprint = CROSS if shape == "diamond" else np.ones((3, 3), bool)
    step = ndimage.grey_erosion if negative else ndimage.grey_dilation
    expected = picture if soft else (picture > 0.5).astype(np.float32)
    for _ in range(radius):
        expected = step(expected, footprint=footprint)
    grow = -radius if negative else radius
    level = 0.0 if soft else 0.5
    result = run(picture, backend, threshold=level, grow=grow, grow_shape=shape)[0]
    assert np.array_equal(result, expected)


@backends
@few
@given(picture=pictures(), radius=st.integers(1, 6), negative=st.booleans())
def test_grey_disk_equals_scipy(backend, picture, radius, negative):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = y * y + x * x <= radius * radius
    step = ndimage.grey_erosion if negative else ndimage.grey_dilation
    grow = -radius if negative else radius
    result = run(picture, backend, threshold=0.0, grow=grow)[0]
    assert np.array_equal(result, step(picture, footprint=disk))


@backends
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4, 9, 16, 33, 70])
def test_grey_values_at_a_border_go_as_far_as_anywhere(backend, shape, radius):
    """Single bright and dark pixels, in noise, nearer to every border than the radius."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    footprint = {
        "disk": y * y + x * x <= radius * radius,
        "diamond": abs(y) + abs(x) <= radius,
        "square": np.ones(y.shape, bool),
    }[shape]
    picture = (np.random.default_rng(radius).random((67, 45), np.float32) + 1) / 3
    picture[::13, ::7] += 0.3
    picture[5::11, 3::9] -= 0.3
    grown = run(picture, backend, threshold=0.0, grow=radius, grow_shape=shape)[0]
    shrunk = run(picture, backend, threshold=0.0, grow=-radius, grow_shape=shape)[0]
    assert np.array_equal(grown, ndimage.grey_dilation(picture, footprint=footprint))
    assert np.array_equal(shrunk, ndimage.grey_erosion(picture, footprint=footprint))


@backends
@few
@given(
    picture=pictures(),
    feather=st.sampled_from([0.5, 1.0, 2.5, 12.0, 15.0, 15.5, 16.0, 40.0, 100.0]),
)
def test_ramps_follow_the_exact_distance(backend, picture, feather):
    bits = picture > 0.5
    outside, inside = distance(bits), distance(~bits)
    signed = np.where(bits, inside - 0.5, 0.5 - outside)
    expected = {
        "ramp_out": np.clip(1 - outside / feather, 0, 1),
        "ramp_in": np.clip(inside / feather, 0, 1),
        "ramp_center": np.clip(0.5 + signed / feather, 0, 1),
    }
    for mode, values in expected.items():
        result = run(picture, backend, feather=feather, feather_mode=mode)[0]
        assert np.abs(result - values).max() <= 1e-6, mode


@backends
@few
@given(
    picture=pictures(),
    sigma=st.sampled_from([0.5, 1.0, 2.5, 4.0, 12.0, 19.5, 20.5, 40.0, 130.0]),
    soft=st.booleans(),
)
def test_gaussian_is_three_uniform_filters(backend, picture, sigma, soft):
    source = picture if soft else picture > 0.5
    expected = source.astype(np.float64)
    for width in box_widths(sigma):
        expected = ndimage.uniform_filter(expected, width, mode="nearest")
    level = 0.0 if soft else 0.5
    result = run(picture, backend, threshold=level, feather=sigma, feather_mode="gaussian")[0]
    assert np.abs(result - expected).max() <= 1e-5
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.2, 3.0, 12.0, 12.4, 18.0, 40.7, 127.0, 255.0])
def test_box_widths_come_nearest_to_the_variance(sigma):
    """No other mix of those two widths has a variance, sum of (w^2 - 1) / 12, nearer to sigma^2."""
    widths = box_widths(sigma)
    lower = min(widths) if len(set(widths)) == 2 else widths[0]

    def error(chosen):
        return abs(sum(w * w - 1 for w in chosen) / 12 - sigma * sigma)

    mixes = [[low] * n + [low + 2] * (3 - n) for low in (lower - 2, lower) for n in range(4)]
    assert all(w % 2 for w in widths)
    assert error(widths) <= min(error(mix) for mix in mixes if mix[0] > 0) + 1e-9
    assert abs(np.sqrt(sum(w * w - 1 for w in widths) / 12) - sigma) < 0.32


def test_gaussian_is_near_a_true_gaussian():
    bits = np.zeros((200, 200), np.float32)
    bits[60:140, 60:140] = 1
    result = run(bits, feather=12.0, feather_mode="gaussian")[0]
    assert np.abs(result - ndimage.gaussian_filter(bits.astype(float), 12)).max() < 0.02


@backends
@pytest.mark.parametrize("mode", ["median3", "median5"])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_temporal_median_equals_scipy(backend, mode, count):
    clip = np.random.default_rng(count).random((count, 9, 700), np.float32)
    size = int(mode[-1])
    expected = ndimage.median_filter(clip, (size, 1, 1), mode="nearest")
    assert np.array_equal(run(clip, backend, threshold=0.0, temporal=mode), expected)


@backends
def test_ema_and_union_by_their_definition(backend):
    clip = np.random.default_rng(0).random((7, 9, 700), np.float32)
    ema = clip.astype(np.float64)
    for t in range(1, len(ema)):
        ema[t] = 0.7 * ema[t - 1] + 0.3 * clip[t]
    result = run(clip, backend, threshold=0.0, temporal="ema", temporal_strength=0.7)
    assert np.abs(result - ema).max() <= 1e-6
    union = run(clip, backend, threshold=0.0, temporal="union")
    assert np.array_equal(union, np.broadcast_to(clip.max(axis=0), clip.shape))


# Both backends, all steps together


@few
@given(data=st.data())
def test_whole_chain_equals_the_reference(data):
    picture = data.draw(pictures())
    clip = np.stack([picture, np.roll(picture, 3, axis=1), picture.T.reshape(picture.shape)])
    soft = data.draw(st.booleans())
    chosen = dict(
        threshold=0.0 if soft else data.draw(st.sampled_from([0.2, 0.5, 0.7])),
        fill_holes=data.draw(st.sampled_from([0, -1, 8])),
        drop_islands=data.draw(st.sampled_from([0, 5, 40])),
        keep_largest=data.draw(st.sampled_from([0, 0, 1, 3])),
        grow=data.draw(st.sampled_from([0, 1, -1, 4, -6, 20])),
        grow_shape=data.draw(st.sampled_from(SHAPES)),
        feather=data.draw(st.sampled_from([0.0, 1.0, 6.5, 17.0])),
        feather_mode="gaussian" if soft else data.draw(st.sampled_from(FEATHERS)),
        temporal=data.draw(st.sampled_from(TEMPORAL)),
    )
    fast, slow = run(clip, "numba", **chosen), run(clip, "scipy", **chosen)
    assert np.abs(fast - slow).max() <= 1e-5


# Properties


@few
@given(picture=pictures(), shape=st.sampled_from(SHAPES), a=st.integers(1, 9), b=st.integers(1, 9))
def test_growing_is_extensive_monotone_and_adds_up(picture, shape, a, b):
    bits = picture > 0.5
    small = run(picture, grow=a, grow_shape=shape)[0]
    large = run(picture, grow=a + b, grow_shape=shape)[0]
    assert (bits <= small).all()
    assert (small <= large).all()
    assert (run(small, grow=b, grow_shape=shape)[0] <= large).all()
    assert (small <= run(np.maximum(picture, picture[::-1]), grow=a, grow_shape=shape)[0]).all()


@few
@given(picture=pictures(), shape=st.sampled_from(SHAPES), radius=st.integers(1, 70))
def test_shrinking_is_growing_of_the_background(picture, shape, radius):
    bits = (picture > 0.5).astype(np.float32)
    shrunk = run(bits, grow=-radius, grow_shape=shape)
    assert np.array_equal(shrunk, 1 - run(1 - bits, grow=radius, grow_shape=shape))


@few
@given(picture=pictures(), change=st.sampled_from(["fill_holes", "drop_islands", "keep_largest"]))
def test_cleaning_twice_is_cleaning_once(picture, change):
    once = run(picture, **{change: 7})
    assert np.array_equal(run(once, **{change: 7}), once)


@few
@given(
    picture=pictures(), grow=st.integers(-5, 9), mode=st.sampled_from(FEATHERS), fill=st.booleans()
)
def test_a_transposed_mask_gives_the_transposed_result(picture, grow, mode, fill):
    chosen = dict(grow=grow, feather=3.0, feather_mode=mode, fill_holes=-1 if fill else 0)
    upright, lying = run(picture, **chosen)[0], run(np.ascontiguousarray(picture.T), **chosen)[0]
    assert np.abs(upright - lying.T).max() <= (1e-6 if mode == "gaussian" else 0)


@pytest.mark.parametrize("mode", FEATHERS)
@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (7, 3), (63, 65), (64, 64)])
def test_a_moved_mask_gives_the_moved_result(mode, dy, dx):
    mask = np.zeros((320, 330), np.float32)
    mask[90:170, 90:170] = blobs(80, 80, 3)
    chosen = dict(fill_holes=30, drop_islands=5, grow=6, feather=5.0, feather_mode=mode)
    moved = run(np.roll(mask, (dy, dx), (0, 1)), **chosen)[0]
    assert np.array_equal(moved, np.roll(run(mask, **chosen)[0], (dy, dx), (0, 1)))


def every_kind() -> list[dict]:
    binary = [dict(feather=9.0, feather_mode=m, grow=g) for m in FEATHERS for g in (5, -3)]
    soft = dict(threshold=0.0, feather=4.0, feather_mode="gaussian", grow=3)
    common = dict(fill_holes=40, drop_islands=9, keep_largest=6)
    times = [dict(temporal=t) for t in TEMPORAL]
    return [common | one for one in [*binary, soft, *times]]


@pytest.mark.parametrize("chosen", every_kind(), ids=str)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_no_bit(chosen, threads, monkeypatch):
    clip = np.stack([blobs(150, 131, seed) for seed in range(7)])
    alone = run(clip, threads=1, **chosen)
    assert np.array_equal(run(clip, threads=threads, **chosen), alone)
    monkeypatch.setattr(dispatch, "SPLIT_FROM", 1)
    assert np.array_equal(run(clip[:1], threads=threads, **chosen)[0], run(clip[:1], **chosen)[0])


def test_bands_of_a_large_picture_change_no_bit(monkeypatch):
    monkeypatch.setattr(dispatch, "SPLIT_FROM", 1)
    picture = blobs(1100, 300, 1, 8.0)
    for mode in FEATHERS:
        chosen = dict(fill_holes=-1, grow=30, feather=20.0, feather_mode=mode)
        alone, split = run(picture, threads=1, **chosen), run(picture, threads=2, **chosen)
        assert np.array_equal(alone, split), mode


# The public functions


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_input_is_never_changed_whatever_its_layout(dtype, order):
    clip = np.asarray(np.stack([blobs(40, 50, s) for s in range(3)]).astype(dtype), order=order)
    kept = clip.copy()
    for chosen in every_kind():
        result = refine(clip, RefineSettings(**chosen))
        expected = refine(np.ascontiguousarray(clip.astype(np.float32)), RefineSettings(**chosen))
        assert result.dtype == np.float32
        assert np.array_equal(result, expected)
        assert np.array_equal(clip, kept)


@backends
def test_nan_counts_as_zero(backend):
    clip = np.stack([blobs(40, 50, s) for s in range(5)])
    holes = clip.copy()
    spots = np.random.default_rng(0).random(clip.shape) < 0.1
    holes[spots], clip[spots] = np.nan, 0
    for chosen in every_kind():
        assert np.array_equal(run(holes, backend, **chosen), run(clip, backend, **chosen)), chosen


@backends
def test_values_outside_the_range_count_as_the_nearest_inside(backend):
    clip = np.stack([blobs(40, 50, s) for s in range(5)])
    odd, within = clip.copy(), np.random.default_rng(1).random(clip.shape)
    for low, value in ((0.02, np.inf), (0.04, -np.inf), (0.06, 7.0), (0.08, -3.0)):
        spots = (within >= low - 0.02) & (within < low)
        odd[spots], clip[spots] = value, float(value > 0)
    for chosen in every_kind():
        assert np.array_equal(run(odd, backend, **chosen), run(clip, backend, **chosen)), chosen


def test_two_dimensions_and_no_frames():
    one = np.stack([blobs(40, 50, s) for s in range(2)])[:, None]
    assert np.array_equal(refine(one, RefineSettings(grow=2)), run(one[:, 0], grow=2))
    with pytest.raises(FrugalError, match="not an image"):
        refine(np.zeros((1, 40, 50, 3), np.float32), RefineSettings())
    picture = blobs(40, 50, 0)
    assert np.array_equal(refine(picture, RefineSettings(grow=2)), run(picture, grow=2))
    assert refine(np.empty((0, 40, 50), np.float32), RefineSettings(grow=2)).shape == (0, 40, 50)
    assert bbox(np.empty((0, 40, 50), np.float32)) is None


@few
@given(picture=pictures())
def test_bbox_is_tight(picture):
    bits = (picture > 0.5).astype(np.float32)
    found = bbox(np.stack([bits, np.zeros_like(bits)]))
    if not bits.any():
        assert found is None
        return
    top, left, bottom, right = measure.regionprops(bits.astype(int))[0].bbox
    assert found == (left, top, right - left, bottom - top)


def test_invert_is_one_minus_the_mask():
    picture = blobs(40, 50, 0)
    assert np.array_equal(invert(picture), 1 - picture)


def test_progress_counts_frames_and_an_error_in_it_stops_the_work():
    clip, seen = np.stack([blobs(64, 64, s) for s in range(20)]), []
    refine(clip, RefineSettings(), lambda *step: seen.append(step), threads=2)
    assert seen[-1] == (20, 20)

    class Cancelled(BaseException):
        pass

    def cancel(done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        refine(clip, RefineSettings(), cancel, threads=2)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"shape \[1, 8, 8, 3\]"),
        (np.zeros(8, np.float32), r"shape \[8\]"),
        (np.zeros((1, 0, 8), np.float32), "8 x 0 px"),
        (np.zeros((8, 8), np.uint8), "uint8"),
        ([[0.0]], "list"),
    ],
)
def test_a_mask_of_another_kind_is_refused(mask, words):
    for function in (lambda m: refine(m, RefineSettings()), bbox):
        with pytest.raises(FrugalError, match=words) as caught:
            function(mask)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 1.5), ("threshold", float("nan")), ("fill_holes", -2), ("drop_islands", -1),
        ("keep_largest", 1000), ("grow", 513), ("grow", -513), ("feather", -1.0),
        ("feather", 256.0), ("temporal_strength", 1.0), ("grow_shape", "star"),
        ("feather_mode", "blur"), ("temporal", "mean"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(FrugalError, match=name):
        RefineSettings(**{name: value})


def test_a_ramp_without_a_hard_edge_is_refused():
    with pytest.raises(FrugalError, match="hard edge"):
        RefineSettings(threshold=0.0, feather=2.0, feather_mode="ramp_in")
    assert dataclasses.replace(RefineSettings(threshold=0.0), feather_mode="ramp_in").soft
