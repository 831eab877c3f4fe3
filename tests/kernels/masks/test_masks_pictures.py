"""Compositing, and the crop window that follows a mask, with the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks import dispatch
from frugal.kernels.masks.pictures import Window, composite, crop, uncrop, window

few = settings(max_examples=40, deadline=None, derandomize=True)
SIDES = [1, 2, 63, 64, 65]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


@st.composite
def blends(draw):
    """Destination, source, mask, x, y of awkward sizes; the source may stick out or miss."""
    height, width = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    h, w = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    channels, seed = draw(st.sampled_from([1, 3, 4])), draw(st.integers(0, 999))
    mask = np.clip(noise(2, h, w, seed=seed) * 3 - 1, 0, 1)
    mask[:, : h // 3], mask[:, h // 2 :, : w // 2] = 0, 1
    x, y = draw(st.integers(-70, 70)), draw(st.integers(-70, 70))
    return noise(2, height, width, channels), noise(2, h, w, channels, seed=1), mask, x, y


@few
@given(blend=blends())
def test_composite_is_the_formula_and_keeps_what_is_outside(blend):
    below, above, mask, x, y = blend
    result = composite(below, above, mask, x, y)
    expected = below.astype(np.float64)
    rows = [row for row in range(mask.shape[1]) if 0 <= y + row < below.shape[1]]
    columns = [column for column in range(mask.shape[2]) if 0 <= x + column < below.shape[2]]
    for row in rows:
        for column in columns:
            m = mask[:, row, column, None].astype(np.float64)
            at = slice(None), y + row, x + column
            expected[at] = m * above[:, row, column] + (1 - m) * below[at]
    assert np.abs(result - expected).max() <= 2e-7
    untouched = expected == below
    assert np.array_equal(result[untouched], below[untouched])
    frames = (np.ascontiguousarray(a) for a in (below, above, mask))
    slow = dispatch.run_composite(*frames, np.array([x]), np.array([y]), 2, use_numba=False)
    assert np.array_equal(result, slow)


def test_where_the_mask_is_zero_a_broken_source_does_no_harm():
    below, above, mask = (
        noise(1, 9, 9, 3),
        np.full((1, 9, 9, 3), np.nan, np.float32),
        noise(1, 9, 9),
    )
    mask[0, :, 3:] = 0
    mask[0, 4, 5] = np.nan
    result = composite(below, above, mask)
    assert np.isnan(result[0, :, :3]).all()
    assert np.array_equal(result[0, :, 3:], below[0, :, 3:])


def test_pictures_with_and_without_alpha_go_together():
    """As in ComfyUI's own ImageCompositeMasked: the destination's channels count."""
    rgb, rgba, mask = noise(1, 9, 9, 3), noise(1, 9, 9, 4, seed=1), noise(1, 9, 9, seed=2)
    assert np.array_equal(composite(rgb, rgba, mask), composite(rgb, rgba[..., :3], mask))
    opaque = np.concatenate([rgb, np.ones((1, 9, 9, 1), np.float32)], axis=3)
    assert np.array_equal(composite(rgba, rgb, mask), composite(rgba, opaque, mask))


def test_a_weight_outside_the_range_does_not_extrapolate():
    below, above, mask = noise(1, 9, 9, 3), noise(1, 9, 9, 3, seed=1), noise(1, 9, 9, seed=2)
    odd = mask.copy()
    odd[0, 2], odd[0, 3], mask[0, 2], mask[0, 3] = 1.5, -np.inf, 1, 0
    odd[0, 4], mask[0, 4] = np.inf, 1
    assert np.array_equal(composite(below, above, odd), composite(below, above, mask))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_of_one_repeat_and_threads_change_nothing(threads):
    below, above, mask = noise(5, 20, 30, 3), noise(1, 8, 9, 3, seed=1), noise(1, 8, 9, seed=2)
    kept = below.copy()
    result = composite(below, above, mask, 3, 4, threads=threads)
    every = composite(below, np.repeat(above, 5, 0), np.repeat(mask, 5, 0), 3, 4)
    assert np.array_equal(result, every)
    assert np.array_equal(below, kept)
    assert composite(below[:1], np.repeat(above, 5, 0), mask).shape == (5, 20, 30, 3)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 8, 8, 3), (1, 8, 8, 1), (1, 8, 8)), "1 and a destination of 3 channels"),
        (((1, 8, 8, 3), (1, 8, 8, 3), (1, 8, 9)), "mask of 9 x 8 px"),
        (((2, 8, 8, 3), (3, 8, 8, 3), (1, 8, 8)), "destination of 2 frames, source of 3"),
        (((8, 8, 3), (1, 8, 8, 3), (1, 8, 8)), r"destination of shape \[8, 8, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, words):
    with pytest.raises(FrugalError, match=words):
        composite(*(np.zeros(shape, np.float32) for shape in shapes))


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """A small square that wanders, with an empty frame now and then."""
    mask = np.zeros((frames, height, width), np.float32)
    rng = np.random.default_rng(7)
    for t in range(frames):
        x = int((width - 12) * (0.5 + 0.5 * np.sin(t / 4)))
        y = int(rng.integers(0, height - 9))
        if t % 5 != 3:
            mask[t, y : y + 9, x : x + 12] = 0.4
    return mask


@pytest.mark.parametrize("mode", ["union", "follow"])
@pytest.mark.parametrize("smoothing", [0.0, 3.0])
@pytest.mark.parametrize(("height", "width"), [(200, 300), (65, 63), (16, 200)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_window_holds_every_mask_at_one_size(mode, smoothing, height, width, multiple):
    mask = moving(20, height, width)
    where = window(mask, 1.5, multiple, mode, smoothing)
    w, h = where.size
    assert w % multiple == h % multiple == 0
    for t, (x, y) in enumerate(where.corners):
        rows, columns = mask[t].any(1), mask[t].any(0)
        assert not rows[: max(0, y)].any() and not rows[y + h :].any(), t
        assert not columns[: max(0, x)].any() and not columns[x + w :].any(), t
        assert (x >= 0 and x + w <= width) or w > width
        assert (y >= 0 and y + h <= height) or h > height
    if mode == "union":
        assert (where.corners == where.corners[0]).all()


def test_smoothing_calms_the_path_and_empty_frames_keep_the_last_box():
    mask = moving(40, 200, 300)
    plain, calm = window(mask, smoothing=0).corners, window(mask, 3.0, smoothing=4).corners
    assert np.abs(np.diff(calm, axis=0)).sum() < 0.85 * np.abs(np.diff(plain, axis=0)).sum()
    assert np.array_equal(plain[3], plain[2]) and np.array_equal(plain[8], plain[7])
    late = mask.copy()
    late[:6] = 0
    corners = window(late, smoothing=0).corners
    assert (corners[:6] == corners[6]).all()


def test_a_clip_without_a_mask_is_refused():
    with pytest.raises(FrugalError, match="empty in all of its 3 frames"):
        window(np.zeros((3, 8, 8), np.float32))


@pytest.mark.parametrize(("name", "value"), [("context", 0.9), ("context", float("nan")),
                                             ("multiple", 0), ("multiple", 300),
                                             ("smoothing", -1.0), ("mode", "box")])  # fmt: skip
def test_window_settings_out_of_range_are_refused(name, value):
    with pytest.raises(FrugalError, match=name):
        window(np.ones((1, 8, 8), np.float32), **{name: value})


@pytest.mark.parametrize(("height", "width", "multiple"), [(100, 120, 16), (30, 20, 64)])
def test_crop_and_uncrop_lose_nothing_and_touch_nothing_outside(height, width, multiple):
    picture, mask = noise(20, height, width, 3), moving(20, height, width)
    where = window(mask, 1.2, multiple)
    cut, cut_mask = crop(picture, where, "edge"), crop(mask, where, "zero")
    assert cut.shape == (20, where.size[1], where.size[0], 3)
    assert np.count_nonzero(cut_mask) == np.count_nonzero(mask) > 0
    assert np.array_equal(uncrop(picture, cut, where), picture)
    painted = uncrop(picture, cut + 1, where)
    for t, (x, y) in enumerate(where.corners):
        inside = np.zeros((height, width), bool)
        inside[max(0, y) : max(0, y + where.size[1]), max(0, x) : max(0, x + where.size[0])] = True
        assert np.array_equal(painted[t][~inside], picture[t][~inside])
        assert (painted[t][inside] >= 1).all()
    masked = uncrop(picture, cut + 1, where, (cut_mask > 0).astype(np.float32))
    assert np.array_equal(masked[mask == 0], picture[mask == 0])
    assert (masked[mask > 0] >= 1).all()


def test_a_window_past_the_picture_repeats_the_border():
    where = Window(np.array([[-2, -1]]), (8, 6), (4, 4))
    picture = noise(1, 4, 4, 2)
    padded = np.pad(picture, ((0, 0), (1, 1), (2, 2), (0, 0)), mode="edge")
    assert np.array_equal(crop(picture, where, "edge"), padded)
    zero = np.pad(picture[..., 0], ((0, 0), (1, 1), (2, 2)))
    assert np.array_equal(crop(picture[..., 0], where, "zero"), zero)


def test_another_picture_than_at_the_crop_is_refused():
    where = window(np.ones((2, 32, 32), np.float32))
    with pytest.raises(FrugalError, match="32 x 16 px"):
        crop(noise(2, 16, 32, 3), where, "edge")
    with pytest.raises(FrugalError, match="48 x 32 px"):
        uncrop(noise(2, 32, 32, 3), noise(2, 32, 48, 3), where)
    with pytest.raises(FrugalError, match="frames"):
        uncrop(noise(3, 32, 32, 3), noise(2, 32, 32, 3), where)
