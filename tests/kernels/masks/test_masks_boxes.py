"""The rule of every box: what counts, and which specks do not."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import measure

from frugal.kernels.masks import dispatch
from frugal.kernels.masks.refine import SPECK, RefineSettings


@pytest.mark.parametrize("backend", ["numba", "scipy"])
def test_specks_move_no_box_and_real_parts_do(backend):
    """Against scikit-image's regions, with the rule applied to its areas."""
    rng = np.random.default_rng(3)
    frames = [np.zeros((120, 150), np.float32)]  # empty
    for count in (1, 2, 5, 12):
        frame = np.zeros((120, 150), np.float32)
        for _ in range(count):
            y, x = rng.integers(0, 110), rng.integers(0, 140)
            frame[y : y + rng.integers(1, 70), x : x + rng.integers(1, 70)] = rng.uniform(0.01, 1)
        frame[rng.random(frame.shape) < 2e-4] = 1
        frames.append(frame)
    frames.append(np.full((120, 150), 4e-4, np.float32))  # a segmenter's background
    frames[-1][30:70, 80:110] = 0.999
    frames.append(np.full((120, 150), np.nan, np.float32))
    clip = np.stack(frames)
    use = backend == "numba"
    found = dispatch.run_boxes(clip, float(RefineSettings.SOFT_EMPTY), SPECK, 2, use)
    for frame, box in zip(clip, found.tolist(), strict=True):
        seen = measure.regionprops(measure.label(frame > 0.5 / 255, connectivity=2))
        large = [r.bbox for r in seen if r.area * 1000 >= max(s.area for s in seen)]
        if not large:
            assert box == [0, 0, 0, 0]
            continue
        top, left = min(b[0] for b in large), min(b[1] for b in large)
        bottom, right = max(b[2] for b in large), max(b[3] for b in large)
        assert box == [left, top, right - left, bottom - top]
    assert found[-2].tolist() == [80, 30, 30, 40]
    noise = (rng.random((2, 70, 65)) < 0.5).astype(np.float32)
    assert (dispatch.run_boxes(noise, 0.5, 1000, 1, use)[:, 2:] > 60).all()
