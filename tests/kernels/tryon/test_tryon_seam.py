"""Colours matched at the seam: found from the ring, applied to the whole, outside untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import canvas, seam


def picture(seed, height=96, width=64):
    """Smooth in 0.2..0.8, so that small shifts never clip."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 4, generator=g)
    grown = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (0.2 + 0.6 * grown.clamp(0, 1)).movedim(1, -1)


def hole(height=96, width=64):
    mask = torch.zeros(1, height, width)
    mask[:, 30:70, 20:45] = 1
    return mask


def test_ring_is_the_border_of_the_mask_and_nothing_of_it():
    mask = hole()[0]
    found = seam.ring(mask)
    assert found.sum() == (40 + 8) * (25 + 8) - 40 * 25  # 64 // 16 = 4 px on every side
    assert not (found & (mask > 0)).any() and found[26, 16] and not found[25, 16]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0.8, 1.25), min_size=3, max_size=3),
    st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_a_linear_shift_is_undone(gain, offset, seed):
    photo = picture(seed)[0]
    changed = photo * torch.tensor(gain) + torch.tensor(offset)
    found = seam.match(changed, photo, hole()[0])
    assert (found - photo).abs().max() < 1e-4


def test_the_inside_does_not_decide():
    """What was painted in the mask must not pull the colours, and gets the ring's shift."""
    photo = picture(1)[0]
    painted, inside = photo - 0.1, hole()[0] > 0
    painted[inside] = torch.tensor([0.5, 0.3, 0.4])
    found = seam.match(painted, photo, hole()[0])
    assert (found[~inside] - photo[~inside]).abs().max() < 1e-4
    assert torch.allclose(found[inside][0], torch.tensor([0.6, 0.4, 0.5]), atol=1e-3)


def test_flat_and_extreme_rings_are_kept_in_bounds():
    photo = picture(2)[0]
    flat = torch.full_like(photo, 0.4)
    found = seam.match(flat, photo, hole()[0])
    wanted = photo[seam.ring(hole()[0])].mean(dim=0)
    assert torch.allclose(found[0, 0], wanted, atol=1e-5)
    weak = 0.5 + (photo - 0.5) * 0.1  # a tenth of the contrast: at most doubled
    matched = seam.match(weak, photo, hole()[0])
    gain = matched.flatten(0, 1).std(dim=0) / weak.flatten(0, 1).std(dim=0)
    assert torch.allclose(gain, torch.full((3,), seam.STRONGEST), rtol=1e-3)


def test_too_little_around_the_mask_is_refused():
    with pytest.raises(FrugalError, match="color_match off"):
        seam.match(picture(0)[0], picture(1)[0], torch.ones(96, 64))


@pytest.mark.parametrize("fit", [canvas.CROP, canvas.LETTERBOX])
@pytest.mark.parametrize("blur", [0, 3])
def test_stitch_matches_inside_and_keeps_the_outside_to_the_bit(fit, blur):
    photo, mask = picture(5, 131, 90), hole(131, 90)
    made = canvas.prepare(photo, photo, mask, (128, 64), fit)
    shifted = (made.person * 0.9 + 0.08).clamp(0, 1)
    plain = canvas.stitch(shifted, made.frame, blur)
    matched = canvas.stitch(shifted, made.frame, blur, color_match=True)
    assert torch.equal(matched[mask == 0], photo[mask == 0])
    inside = (mask > 0)[..., None].expand_as(photo)
    before = (plain - photo)[inside].abs().mean()
    after = (matched - photo)[inside].abs().mean()
    assert after < before / 4 and before > 0.015
