"""Label maps and the agnostic mask: encodings, names, and an OpenCV twin of the rules."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from frugal.bench.mask_scenes import opencv_agnostic, person_maps
from frugal.kernels.errors import FrugalError
from frugal.kernels.masks import labels
from frugal.kernels.masks.agnostic import (
    HULLS,
    PARTS,
    AgnosticSettings,
    agnostic_mask,
    coat_note,
    mirrored,
)

cv2 = pytest.importorskip("cv2")


def batch(maps) -> tuple[np.ndarray, ...]:
    return tuple(labels[None] for labels in maps)


def noise_maps(height: int, width: int) -> tuple[np.ndarray, ...]:
    """Label maps of patches; every label meets every other."""
    rng = np.random.default_rng(height * 1000 + width)

    def patches(count: int) -> np.ndarray:
        layers = [ndimage.gaussian_filter(rng.random((height, width)), 2) for _ in range(count)]
        return np.argmax(layers, axis=0).astype(np.uint8)

    return patches(25), patches(20), patches(18)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agnostic_mask_agrees_with_opencv(part, seed):
    maps = person_maps(512, 384, seed, skirt=seed == 1, coat=seed == 2)
    ours = agnostic_mask(*batch(maps), AgnosticSettings(part))[0] > 0
    theirs = opencv_agnostic(*maps, part) > 0
    assert 0.05 < ours.mean() < 0.8
    assert (ours & theirs).sum() >= 0.99 * (ours | theirs).sum()
    # OpenCV paints the outline of a hull and rounds its blur; both move the edge by a pixel or so.
    to_edge = ndimage.distance_transform_edt(theirs) + ndimage.distance_transform_edt(~theirs)
    assert (to_edge[ours != theirs] > 3).mean() < 0.02


def test_a_hundred_persons_of_any_size_agree_with_opencv():
    """Odd sides, portrait and landscape, all garments; the person fills the height."""
    rng = np.random.default_rng(11)
    shares = []
    for seed in range(100):
        height, width = (int(side) for side in rng.integers((420, 300), (640, 620)))
        maps = person_maps(height, width, seed, skirt=seed % 3 == 1, coat=seed % 3 == 2)
        part = PARTS[seed % len(PARTS)]
        ours = agnostic_mask(*batch(maps), AgnosticSettings(part))[0] > 0
        theirs = opencv_agnostic(*maps, part) > 0
        assert 0.01 < ours.mean() < 0.9, (seed, part)
        shares.append((ours & theirs).sum() / (ours | theirs).sum())
    assert min(shares) >= 0.99, [(n, share) for n, share in enumerate(shares) if share < 0.99]


@pytest.mark.parametrize("hull", HULLS)
@pytest.mark.parametrize("size", [(1, 1), (1, 63), (64, 1), (65, 130), (203, 155)], ids=str)
def test_both_backends_agree_to_the_bit(hull, size):
    maps = batch(noise_maps(*size))
    for part in PARTS:
        chosen = AgnosticSettings(part, hull, 4)
        fast = agnostic_mask(*maps, chosen)
        assert np.array_equal(fast, agnostic_mask(*maps, chosen, use_numba=False)), part


def test_threads_change_nothing_and_one_map_serves_all_its_frames():
    frames = [person_maps(128, 96, seed) for seed in range(5)]
    clips = [np.stack(maps) for maps in zip(*frames, strict=True)]
    kept = [clip.copy() for clip in clips]
    alone = agnostic_mask(*clips, AgnosticSettings(), threads=1)
    assert np.array_equal(agnostic_mask(*clips, AgnosticSettings(), threads=3), alone)
    for n in (0, 4):
        assert np.array_equal(agnostic_mask(*batch(frames[n]), AgnosticSettings())[0], alone[n])
    assert all(np.array_equal(a, b) for a, b in zip(kept, clips, strict=True))


def test_face_and_hands_are_kept_and_clothes_go():
    dense, lip, atr = person_maps(512, 384, 0)
    mask = agnostic_mask(*batch((dense, lip, atr)), AgnosticSettings("upper"))[0] > 0
    face = ndimage.binary_erosion(lip == labels.LIP.index("Face"), iterations=3)
    hands = np.isin(dense, [3, 4]) & (lip == labels.LIP.index("Left-arm"))
    assert face.any() and not mask[face].any()
    hands = ndimage.binary_erosion(hands, iterations=3)
    assert hands.any() and not mask[hands].any()
    assert mask[(lip == labels.LIP.index("Upper-clothes")) & ~np.isin(lip, [13])].mean() > 0.98
    without = agnostic_mask(None, lip[None], None, AgnosticSettings("upper"))[0] > 0
    assert without[hands].any(), "hands are found through DensePose"
    assert not without[face].any()
    from_atr = agnostic_mask(None, None, atr[None], AgnosticSettings("upper"))[0] > 0
    core = ndimage.binary_erosion(atr == labels.ATR.index("Face"), iterations=3)
    assert not from_atr[core].any()


def test_maps_that_do_not_fit_are_refused():
    some = np.zeros((1, 8, 8), np.uint8)
    for maps, words in (
        ((some, None, None), "no parsing map"),
        ((some, np.zeros((1, 8, 9), np.uint8), None), "one shape"),
        ((None, some.astype(np.int64), None), "LIP map of int64"),
    ):
        with pytest.raises(FrugalError, match=words):
            agnostic_mask(*maps, AgnosticSettings())


@pytest.mark.parametrize("changes", [dict(part="hat"), dict(hull="box"), dict(dilate=4),
                                     dict(blur=600), dict(radius=0)])  # fmt: skip
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(FrugalError, match=next(iter(changes))):
        AgnosticSettings(**changes)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_mirrored_indices_equal_numpy(size):
    assert np.array_equal(mirrored(size, 7), np.pad(np.arange(size), 7, mode="reflect"))


# Label maps


def picture(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.float32) / 255


def spread(count: int) -> np.ndarray:
    return np.repeat((np.arange(count) * 255 // 24)[:, None], 3, 1).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "encoding", "table"),
    [
        ("ATR", "grey level", np.repeat(np.arange(18)[:, None], 3, 1)),
        ("LIP", "VOC colours", labels.voc_palette(20)),
        ("numbers", "VOC colours", labels.voc_palette(256)),
        ("DensePose", "grey x 24 / 255", spread(25)),
        ("DensePose", "viridis", labels._hex(labels.VIRIDIS)),
        ("DensePose", "parula", labels._hex(labels.PARULA)),
    ],
)
def test_every_encoding_is_recognised(kind, encoding, table):
    count = len(table)
    numbers = np.random.default_rng(0).integers(0, count, (2, 40, 50)).astype(np.uint8)
    found, how = labels.decode(picture(table[numbers]), kind)
    assert how == encoding
    assert np.array_equal(found, numbers)
    assert np.array_equal(labels.decode(picture(table[numbers]), kind, encoding)[0], numbers)


def test_palettes_are_the_published_ones():
    """The first colours of PASCAL VOC as its development kit prints them; OpenCV's colour maps."""
    first = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128],
             [0, 128, 128], [128, 128, 128], [64, 0, 0]]  # fmt: skip
    assert labels.voc_palette(9).tolist() == first
    assert labels.voc_palette(256)[255].tolist() == [224, 224, 192]
    steps = (np.arange(25) * 255 / 24).astype(np.uint8)[:, None]
    for text, kind in (
        (labels.VIRIDIS, cv2.COLORMAP_VIRIDIS),
        (labels.PARULA, cv2.COLORMAP_PARULA),
    ):
        drawn = cv2.applyColorMap(steps, kind)[:, 0, ::-1].astype(int)
        assert np.abs(drawn - labels._hex(text)).max() <= labels.NEAR // 2


def test_a_smoothed_map_is_refused_by_colour():
    table = labels.voc_palette(18)
    numbers = np.repeat(np.arange(18), 3)[None, None]
    smooth = picture(table[numbers])
    smooth[0, 0, 5] = (0.9, 0.1, 0.3)
    with pytest.raises(FrugalError, match="#e61a4d in a ATR map"):
        labels.decode(smooth, "ATR")
    with pytest.raises(FrugalError, match="labels 0 to 17"):
        labels.decode(picture(np.full((1, 2, 2, 3), 18)), "ATR", "grey level")


def test_parts_by_name_number_and_side():
    assert labels.part_ids("ATR", "upper clothes, DRESS") == [4, 7]
    assert labels.part_ids("LIP", "Arm, Left-shoe") == [14, 15, 18]
    assert labels.part_ids("DensePose", "thigh, 23-24") == [7, 8, 9, 10, 23, 24]
    assert labels.part_ids("numbers", "4, 7-9") == [4, 7, 8, 9]
    for kind, parts in (("ATR", "Coat"), ("ATR", "18"), ("numbers", "hat"), ("LIP", " , "),
                        ("numbers", "9-7")):  # fmt: skip
        with pytest.raises(FrugalError, match="expected"):
            labels.part_ids(kind, parts)


def test_masks_by_label_and_by_colour():
    table = labels.voc_palette(18)
    numbers = np.random.default_rng(0).integers(0, 18, (1, 20, 30)).astype(np.uint8)
    wanted = np.isin(numbers, [1, 4]).astype(np.float32)
    assert np.array_equal(labels.select(numbers, [1, 4]), wanted)
    assert np.array_equal(labels.select_colours(picture(table[numbers]), "#800000,#000080"), wanted)
    for wrong in ("red", "#12345", "", "#80000g"):
        with pytest.raises(FrugalError, match="#rrggbb"):
            labels.select_colours(picture(table[numbers]), wrong)


def test_an_atr_map_cannot_tell_a_coat_and_says_so():
    """Whoever asks for the coat of a map without coats is told, and only they are."""
    _, lip, atr = batch(person_maps(512, 384, 2, coat=True))
    coat = np.isin(lip, [labels.LIP.index("Coat")])
    assert coat.any()
    for part in PARTS:
        said = {with_lip: coat_note(part, with_lip) for with_lip in (True, False)}
        assert said[True] is None
        assert (said[False] is not None) == (part in ("inner", "outer")), part
    # What the note says is so: without LIP the coat is taken for what lies under it.
    outer, upper = (
        agnostic_mask(None, None, atr, AgnosticSettings(part)) for part in ("outer", "upper")
    )
    assert (outer != upper).mean() < 0.01
    inner = agnostic_mask(None, None, atr, AgnosticSettings("inner"))
    told_apart = agnostic_mask(None, lip, None, AgnosticSettings("inner"))
    assert inner[coat].mean() > 0.8 and told_apart[coat].mean() < 0.3
