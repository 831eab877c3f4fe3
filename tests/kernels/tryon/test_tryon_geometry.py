"""Photo to canvas and back: integer geometry, and pixels that must not move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import blending, canvas, checks, geometry, latents, pictures

side = st.integers(16, 90)
cell = st.integers(1, 8).map(lambda n: 16 * n)


@st.composite
def scenes(draw):
    H, W = draw(side), draw(side)
    top, left = draw(st.integers(0, H - 1)), draw(st.integers(0, W - 1))
    box = geometry.Box(top, left, draw(st.integers(1, H - top)), draw(st.integers(1, W - left)))
    return (H, W), box, (draw(cell), draw(cell)), draw(st.integers(0, 400))


def paint(size, box, value=1.0):
    mask = torch.zeros(1, *size)
    mask[:, box.rows, box.columns] = value
    return mask


@given(scenes())
@example(((1024, 768), geometry.Box(200, 150, 500, 400), (1024, 768), 25))
def test_window_holds_the_mask_and_lies_in_photo_and_canvas(scene):
    (H, W), box, (h, w), context = scene
    place = geometry.crop_around(box, (H, W), (h, w), context)
    win, inner = place.window, place.inner
    assert 0 <= win.top <= box.top and box.top + box.height <= win.top + win.height <= H
    assert 0 <= win.left <= box.left and box.left + box.width <= win.left + win.width <= W
    assert inner.top >= 0 and inner.top + inner.height <= h and inner.height >= 1
    assert inner.left >= 0 and inner.left + inner.width <= w and inner.width >= 1
    assert inner.height == h or inner.width == w
    full = inner == geometry.Box(0, 0, h, w)
    # Both sides, in units of one pixel of the coarser grid: the shape is kept.
    slack = max(win.height, win.width, inner.height, inner.width)
    assert abs(win.height * inner.width - win.width * inner.height) <= slack
    # Padding only where no window of the canvas's shape in the photo holds the mask.
    roomy = (H, H * w // h) if H * w <= W * h else (W * h // w, W)
    if box.height <= roomy[0] and box.width <= roomy[1]:
        assert full


def test_a_roomy_photo_gives_the_asked_context():
    box = geometry.Box(400, 300, 200, 100)
    place = geometry.crop_around(box, (1000, 1000), (128, 64), 25)
    assert place.window == geometry.Box(350, 275, 300, 150)
    assert geometry.room_around(box, place) == 25
    at_border = geometry.crop_around(geometry.Box(0, 0, 200, 100), (1000, 1000), (128, 64), 25)
    assert at_border.window == geometry.Box(0, 0, 300, 150)
    assert geometry.room_around(geometry.Box(0, 0, 200, 100), at_border) == 50


def test_letterbox_of_known_sizes():
    assert geometry.fit_inside((1000, 750), (1024, 768)) == geometry.Box(0, 0, 1024, 768)
    assert geometry.fit_inside((500, 1000), (1024, 768)) == geometry.Box(320, 0, 384, 768)
    assert geometry.fit_inside((1000, 100), (1024, 768)) == geometry.Box(0, 333, 1024, 102)


@settings(max_examples=60, deadline=None)
@given(
    scenes(),
    st.sampled_from([canvas.CROP, canvas.LETTERBOX]),
    st.integers(0, 12),
    st.sampled_from(blending.BLENDS),
)
def test_pixels_outside_the_mask_come_back_bit_for_bit(scene, fit, blur, blend):
    size, box, target, context = scene
    g = torch.Generator().manual_seed(size[0] * 97 + size[1])
    photo = torch.rand(1, *size, 3, generator=g)
    mask = paint(size, box)
    try:
        made = canvas.prepare(photo, photo, mask, target, fit, context)
    except FrugalError as error:
        assert "vanishes" in str(error)
        return
    out = canvas.stitch(torch.ones(1, *target, 3), made.frame, blur, blend=blend)
    assert out.shape == photo.shape
    place = made.frame.placements[0]
    far = torch.ones(size, dtype=torch.bool)
    # More than the Gaussian reaches, since the edge is resampled there and back.
    wide = 2 - -(3 * blur + 2) * place.window.height // place.inner.height
    reach = 0 if blend == blending.INSIDE or not blur else wide
    far[
        max(0, box.top - reach) : box.top + box.height + reach,
        max(0, box.left - reach) : box.left + box.width + reach,
    ] = False
    assert torch.equal(out[0][far], photo[0][far])
    # The mask did change: the guard against a stitch that does nothing.
    assert (out[0, box.rows, box.columns] > photo[0, box.rows, box.columns]).any()
    if blur == 0:
        inside = out[0, box.rows, box.columns]
        assert torch.allclose(inside, torch.ones_like(inside), atol=1e-6)
        outside = mask[0] == 0
        assert torch.equal(out[0][outside], photo[0][outside])


@settings(max_examples=40, deadline=None)
@given(scenes(), st.sampled_from([canvas.CROP, canvas.LETTERBOX]))
def test_padding_is_never_repainted(scene, fit):
    size, _, target, context = scene
    whole = geometry.Box(0, 0, *size)
    photo = torch.rand(1, *size, 3)
    made = canvas.prepare(photo, photo, paint(size, whole), target, fit, context)
    inner = made.frame.placements[0].inner
    bars = torch.ones(target, dtype=torch.bool)
    bars[inner.rows, inner.columns] = False
    assert made.mask[0][bars].sum() == 0 and made.mask[0][~bars].min() == 1
    # Bars continue the border, so they hold no colour the photo's edge has not.
    assert made.person.shape == (1, *target, 3) and made.person.max() <= 1


def test_equal_sizes_pass_through_untouched_there_and_back():
    photo, mask = torch.rand(1, 64, 48, 3), torch.zeros(1, 64, 48)
    mask[:, 20:40, 10:30] = 1
    made = canvas.prepare(photo, photo, mask, (64, 48), canvas.LETTERBOX)
    assert torch.equal(made.person, photo) and torch.equal(made.garment, photo)
    assert torch.equal(made.mask, mask)
    assert torch.equal(canvas.stitch(made.person, made.frame, 4), photo)


def test_resampling_there_and_back_keeps_the_picture_in_place():
    rows = torch.linspace(0.1, 0.9, 100)[:, None, None].expand(100, 80, 3)[None]
    mask = paint((100, 80), geometry.Box(30, 20, 40, 30))
    made = canvas.prepare(rows, rows, mask, (128, 96), canvas.CROP, 30)
    out = canvas.stitch(made.person, made.frame, 0)
    # A shift of half a pixel would be an error of 0.004 everywhere in the mask.
    assert (out - rows)[0, 31:69, 21:49].abs().max() < 1e-3


def test_the_default_edge_keeps_what_the_mask_leaves_out():
    """A painted photo at the nodes' default blur: nothing outside the mask moves, the middle is all
    new, and between them the edge is as wide as the blur says, in px of the canvas.
    """
    size, box = (512, 512), geometry.Box(260, 80, 240, 320)
    photo, mask = torch.rand(1, *size, 3), paint(size, box)
    made = canvas.prepare(photo, photo, mask, (512, 384))
    place = made.frame.placements[0]
    inside = blending.weights(mask[0], place, 9, blending.INSIDE)
    both = blending.weights(mask[0], place, 9, blending.BOTH)
    out = canvas.stitch(torch.full((1, 512, 384, 3), 2.0), made.frame, 9)
    assert torch.equal(out[mask == 0], photo[mask == 0])
    out = canvas.stitch(torch.full((1, 512, 384, 3), 2.0), made.frame, 9, blend=blending.BOTH)
    changed = (out != photo).any(dim=-1) & (mask == 0)
    assert changed.sum() > 10_000, "the other blend is there to change them"
    for weight, expected in ((inside, 0.0), (both, 0.5)):
        # Down from the upper edge, at the middle column: the Gaussian's own curve.
        row = box.top - place.window.top
        column = box.left + box.width // 2 - place.window.left
        depth = torch.arange(0.5, 30.5) * place.inner.height / place.window.height
        curve = torch.special.ndtr(depth / 9)
        curve = 2 * curve - 1 if expected == 0 else curve
        found = weight[row : row + 30, column]
        assert (found - curve).abs().max() < 0.03
        assert found[0] == pytest.approx(expected, abs=0.1)


def test_the_edge_is_as_wide_on_a_photo_of_any_size():
    """Twice the photo, twice the edge in its pixels: the same on the canvas."""
    widths = []
    for scale in (1, 2, 4):
        size, box = (
            (256 * scale, 192 * scale),
            geometry.Box(*(v * scale for v in (60, 40, 120, 100))),
        )
        place = geometry.crop_around(box, size, (512, 384), 25)
        weight = blending.weights(paint(size, box)[0], place, 9, blending.INSIDE)
        middle = weight[:, weight.shape[1] // 2]
        widths.append(int(((middle > 0) & (middle < 0.9)).sum()) / scale)
    assert max(widths) - min(widths) <= 1 and min(widths) > 2


def test_a_thin_mask_is_painted_all_the_same():
    """A strip of 6 canvas px has no room for an edge of 9; the photo's border is no edge at all."""
    size, strip = (128, 96), geometry.Box(60, 10, 6, 70)
    place = geometry.letterbox(size, size)
    weight = blending.weights(paint(size, strip)[0], place, 9, blending.INSIDE)
    assert weight.max() > 0.95 and weight[62, 40] > 0.9
    whole = blending.weights(torch.ones(size), place, 9, blending.INSIDE)
    assert whole.min() > 1 - 1e-5
    with pytest.raises(FrugalError, match="blend"):
        blending.weights(torch.ones(size), place, 9, "around")


def test_a_speck_does_not_move_the_window():
    """1080p, a coat of 400 x 600 px and one stray pixel in the corner."""
    mask = paint((1080, 1920), geometry.Box(300, 800, 600, 400))
    stray = mask.clone()
    stray[:, 20, 1900] = 1
    photo = torch.rand(1, 1080, 1920, 3)
    frames = [canvas.prepare(photo, photo, m, (256, 192)).frame for m in (mask, stray)]
    assert frames[0].placements == frames[1].placements
    assert checks.mask_notes(mask, frames[0]) == []
    (note,) = checks.mask_notes(stray, frames[1])
    assert note.startswith("1 px of the mask are specks")
    out = canvas.stitch(torch.ones(1, 256, 192, 3), frames[1], 9)
    assert torch.equal(out[:, 20, 1900], photo[:, 20, 1900])
    # A second part that is no speck counts: a shoe beside the coat.
    shoe = mask.clone()
    shoe[:, 1000:1040, 1500:1540] = 1
    window = canvas.prepare(photo, photo, shoe, (256, 192)).frame.placements[0].window
    assert window.left + window.width >= 1540


def test_masks_that_look_like_a_slip_are_named():
    size, box = (64, 48), geometry.Box(20, 12, 24, 20)
    photo, mask = torch.rand(1, *size, 3), paint(size, box)

    def notes(mask):
        return checks.mask_notes(mask, canvas.prepare(photo, photo, mask, (64, 48)).frame)

    assert notes(mask) == [] and notes(torch.ones_like(mask)) == []
    soft = pictures.blur_mask(mask, 1.0)
    assert notes(soft) == []
    (inverted,) = notes(1 - mask)
    assert "Invert Mask" in inverted and "84 %" in inverted
    (grey,) = notes(photo.mean(dim=-1))
    assert "% of what the mask covers is grey" in grey
    black = torch.zeros(1, 30, 30, 3)
    black[:, 8:20, 8:20] = 0.5
    assert "garment_mask" in checks.garment_notes(black)[0]
    assert checks.garment_notes(black + 0.01) == []


def test_blur_is_exactly_zero_beyond_three_sigma_and_keeps_the_border():
    mask = paint((40, 40), geometry.Box(0, 0, 10, 40))
    soft = pictures.blur_mask(mask, 2.0)
    assert soft[0, 16:].max() == 0 and soft[0, 15].min() > 0
    assert torch.allclose(soft[0, :4], torch.ones(4, 40))
    assert torch.equal(pictures.blur_mask(mask, 0), mask)


def test_batches_broadcast_or_are_refused():
    people, clothes = torch.rand(1, 32, 32, 3), torch.rand(3, 20, 30, 3)
    mask = paint((32, 32), geometry.Box(8, 8, 10, 10))
    made = canvas.prepare(people, clothes, mask, (64, 64))
    assert made.person.shape[0] == made.garment.shape[0] == made.mask.shape[0] == 3
    assert len(made.frame.placements) == 3
    assert canvas.stitch(torch.rand(3, 64, 64, 3), made.frame, 0).shape == (3, 32, 32, 3)
    two = canvas.prepare(people.expand(2, -1, -1, -1), clothes[:1], mask, (64, 64))
    assert canvas.stitch(torch.rand(2, 64, 64, 3), two.frame, 0).shape[0] == 2
    with pytest.raises(FrugalError, match="person 2, garment 3"):
        canvas.prepare(people.expand(2, -1, -1, -1), clothes, mask, (64, 64))
    with pytest.raises(FrugalError, match="result 2, frame 3"):
        canvas.stitch(torch.rand(2, 64, 64, 3), made.frame, 0)


def test_every_picture_of_a_batch_gets_its_own_window():
    photo = torch.rand(2, 64, 64, 3)
    mask = torch.cat(
        [paint((64, 64), geometry.Box(2, 2, 10, 10)), paint((64, 64), geometry.Box(40, 40, 10, 10))]
    )
    made = canvas.prepare(photo, photo[:1], mask, (64, 64))
    assert made.frame.placements[0] != made.frame.placements[1]
    out = canvas.stitch(torch.ones(2, 64, 64, 3), made.frame, 0)
    changed = (out != photo).any(dim=-1)
    assert torch.equal(changed, mask > 0)


def test_channels():
    grey = torch.rand(1, 20, 20, 1)
    assert torch.equal(pictures.as_rgb(grey, "p"), grey.expand(1, 20, 20, 3))
    clear = torch.cat([torch.zeros(1, 20, 20, 3), torch.full((1, 20, 20, 1), 0.25)], dim=-1)
    on_white = pictures.as_rgb(clear, "p")
    assert torch.allclose(on_white, torch.full_like(on_white, 0.75))
    opaque = torch.cat([torch.rand(1, 20, 20, 3), torch.ones(1, 20, 20, 1)], dim=-1)
    assert torch.equal(pictures.as_rgb(opaque, "p"), opaque[..., :3])


def test_a_transparent_garment_stands_on_white_however_its_alpha_comes():
    """As channel, and beside the picture as ComfyUI's Load Image gives it: 1 = transparent."""
    g = torch.Generator().manual_seed(2)
    colour, alpha = torch.rand(1, 30, 20, 3, generator=g), torch.zeros(1, 30, 20)
    alpha[:, 6:24, 4:16] = 1
    colour = colour * alpha[..., None]
    person, mask = torch.rand(1, 32, 32, 3, generator=g), paint((32, 32), geometry.Box(8, 8, 8, 8))
    as_channel = torch.cat([colour, alpha[..., None]], dim=-1)
    made = [
        canvas.prepare(person, as_channel, mask, (64, 48)).garment,
        canvas.prepare(person, colour, mask, (64, 48), garment_mask=1 - alpha).garment,
    ]
    assert torch.equal(*made)
    assert (made[0].amin(dim=-1) == 1).float().mean() > 0.5
    # What Load Image gives beside an opaque picture changes nothing, whatever the size.
    plain = canvas.prepare(person, colour, mask, (64, 48), garment_mask=torch.zeros(1, 64, 64))
    assert torch.equal(plain.garment, canvas.prepare(person, colour, mask, (64, 48)).garment)
    with pytest.raises(FrugalError, match="same Load Image"):
        canvas.prepare(person, colour, mask, (64, 48), garment_mask=torch.ones(1, 31, 20))


def test_a_mask_of_another_size_needs_the_same_aspect():
    small = torch.zeros(1, 32, 24)
    small[:, 8:16] = 1
    big = pictures.as_mask(small, (64, 48), 0.5)
    assert big.shape == (1, 64, 48) and big[:, 16:32].min() == 1 and big.sum() == 16 * 48
    with pytest.raises(FrugalError, match="24 x 32 px and the photo 48 x 65"):
        pictures.as_mask(small, (65, 48), 0.5)


def test_threshold():
    mask = paint((32, 32), geometry.Box(8, 8, 8, 8), 0.3)
    assert pictures.as_mask(mask, (32, 32), 0.3).sum() == 64
    with pytest.raises(FrugalError, match=r"lower mask_threshold: .* largest is 0.3"):
        canvas.prepare(torch.rand(1, 32, 32, 3), torch.rand(1, 32, 32, 3), mask, (64, 64))


@pytest.mark.parametrize("photo", [(64, 64), (64, 48), (100, 100)])
def test_an_unpainted_photo_says_where_to_paint(photo):
    """What Load Image gives beside a photo without alpha: 64 x 64 zeros, whatever the photo."""
    with pytest.raises(FrugalError, match=r"^paint over the clothes .* MaskEditor"):
        canvas.prepare(
            torch.rand(1, *photo, 3), torch.rand(1, 32, 32, 3), torch.zeros(1, 64, 64), (64, 64)
        )


def test_one_rule_for_values_no_mask_has():
    """Above 1 is 1, below 0 and NaN are 0."""
    mask = paint((32, 32), geometry.Box(8, 8, 8, 8))
    odd = mask.clone()
    odd[:, 8:12], odd[:, 20:24] = mask[:, 8:12] * float("inf"), float("-inf")
    odd[:, 26:] = float("nan")
    odd[:, 12:16] *= 3
    odd[:, 8:12, :8] = odd[:, 8:12, 16:] = float("nan")
    assert torch.equal(pictures.as_mask(odd, (32, 32), 0.5), mask)
    assert torch.equal(pictures.as_mask(mask[:, None], (32, 32), 0.5), mask)


@pytest.mark.parametrize(
    "person, garment, mask, match",
    [
        ((1, 1, 1, 3), (1, 32, 32, 3), (1, 1, 1), "the person has 1 x 1 px"),
        ((1, 32, 15, 3), (1, 32, 32, 3), (1, 32, 15), "the person has 15 x 32 px"),
        ((1, 32, 32, 3), (1, 8, 32, 3), (1, 32, 32), "the garment has 32 x 8 px"),
        ((32, 32, 3), (1, 32, 32, 3), (1, 32, 32), "the person has the shape"),
        ((1, 32, 32, 5), (1, 32, 32, 3), (1, 32, 32), "the person has the shape"),
        ((1, 32, 32, 3), (1, 32, 32, 3), (1, 1, 2, 32, 32), "the mask has the shape"),
        ((0, 32, 32, 3), (1, 32, 32, 3), (1, 32, 32), "person 0"),
    ],
)
def test_bad_inputs_each_say_what_is_wrong(person, garment, mask, match):
    with pytest.raises(FrugalError, match=match):
        canvas.prepare(torch.rand(person), torch.rand(garment), torch.ones(mask), (64, 64))


def test_grey_is_exactly_zero_for_the_encoder():
    person, mask = torch.rand(1, 16, 16, 3), paint((16, 16), geometry.Box(4, 4, 8, 8))
    grey = canvas.grey_out(person, mask)
    assert (grey[0, 4:12, 4:12] * 2 - 1).abs().max() == 0
    assert torch.equal(grey[mask == 0], person[mask == 0])


def test_latent_mask_takes_the_top_left_pixel_of_a_cell():
    mask = torch.zeros(1, 64, 32)
    mask[:, 8, 16] = 1
    small = latents.latent_mask(mask, 8)
    assert small.shape == (1, 1, 8, 4) and small[0, 0, 1, 2] == 1 and small.sum() == 1
    mask = torch.zeros(1, 64, 32)
    mask[:, 9:15, 17:23] = 1
    assert latents.latent_mask(mask, 8).sum() == 0


def test_the_person_half_needs_a_stacked_latent():
    stacked = latents.stack(torch.ones(2, 4, 8, 4), torch.zeros(2, 4, 8, 4))
    assert torch.equal(latents.person_half(stacked, (64, 32), 8), torch.ones(2, 4, 8, 4))
    for bad in ((1, 4, 8, 4), (1, 4, 16, 8), (1, 4, 1, 16, 4)):
        with pytest.raises(FrugalError, match="LATENT has the shape"):
            latents.person_half(torch.zeros(bad), (64, 32), 8)
    with pytest.raises(FrugalError, match="differ"):
        latents.check_canvas((64, 32), (64, 64), (1, 64, 32), 8)
    with pytest.raises(FrugalError, match="multiples of 8"):
        latents.check_canvas((60, 32), (60, 32), (1, 60, 32), 8)
