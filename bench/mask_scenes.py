"""Drawn masks and label maps of people, the same on every machine, for benchmarks and tests."""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage


def figure(frames: int, height: int, width: int) -> np.ndarray:
    """A walking figure of capsules with a ragged outline, 24 holes and 40 specks in each frame.

    float32 [frames, height, width] of 0 and 1.
    """
    rng = np.random.default_rng(0)
    clip = np.zeros((frames, height, width), np.float32)
    scale = height / 480
    for t in range(frames):
        canvas = np.zeros((height, width), np.uint8)
        centre = width * (0.5 + 0.1 * np.sin(t / 9))

        def at(x, y, centre=centre):
            return int(centre + x * scale), int(height / 2 + y * scale)

        def limb(a, b, thickness, canvas=canvas):
            cv2.line(canvas, a, b, 255, max(1, int(thickness * scale)))

        cv2.circle(canvas, at(0, -170), int(38 * scale), 255, -1)
        limb(at(0, -110), at(0, 40), 100)
        for side in (-1, 1):
            swing = 40 * np.sin(t / 5 + side)
            limb(at(60 * side, -110), at(108 * side + swing, 40), 34)
            limb(at(30 * side, 40), at(42 * side - swing, 220), 48)
        ragged = ndimage.gaussian_filter(rng.random((height, width), np.float32), 2)
        canvas = np.where(ragged > 0.5, canvas, cv2.erode(canvas, np.ones((5, 5), np.uint8)))
        for _ in range(24):
            spot = at(rng.integers(-45, 46), rng.integers(-100, 40))
            cv2.circle(canvas, spot, int(rng.integers(1, 10)), 0, -1)
        for _ in range(40):
            spot = int(rng.integers(width)), int(rng.integers(height))
            cv2.circle(canvas, spot, int(rng.integers(0, 5)), 255, -1)
        clip[t] = canvas / np.float32(255)
    return clip


# Capsules in units of the body's height: label name by map, two ends (x, y), thickness. "-" keeps
# what is below. Left and right are the person's own, so the left arm lies on the right.
BODY = (
    ("Right-leg", "Right-leg", "Right-calf", (-0.08, 0.18), (-0.10, 0.42), 0.08),
    ("Left-leg", "Left-leg", "Left-calf", (0.08, 0.18), (0.11, 0.42), 0.08),
    ("Right-shoe", "Right-shoe", "Right-foot", (-0.10, 0.45), (-0.13, 0.46), 0.06),
    ("Left-shoe", "Left-shoe", "Left-foot", (0.11, 0.45), (0.14, 0.46), 0.06),
    ("Right-arm", "Right-arm", "Right-forearm", (-0.21, -0.06), (-0.20, 0.08), 0.055),
    ("Left-arm", "Left-arm", "Left-forearm", (0.21, -0.06), (0.17, 0.08), 0.055),
    ("Right-arm", "Right-arm", "Right-hand", (-0.20, 0.10), (-0.20, 0.13), 0.05),
    ("Left-arm", "Left-arm", "Left-hand", (0.17, 0.10), (0.16, 0.13), 0.05),
    ("Pants", "Pants", "Right-thigh", (-0.05, 0.10), (-0.08, 0.24), 0.10),
    ("Pants", "Pants", "Left-thigh", (0.05, 0.10), (0.08, 0.24), 0.10),
    ("Upper-clothes", "Upper-clothes", "Torso", (0.0, -0.20), (0.0, 0.06), 0.20),
    ("Upper-clothes", "Upper-clothes", "Right-upper-arm", (-0.12, -0.21), (-0.20, -0.08), 0.08),
    ("Upper-clothes", "Upper-clothes", "Left-upper-arm", (0.12, -0.21), (0.20, -0.08), 0.08),
    ("Coat", "Scarf", "-", (-0.05, -0.30), (0.06, -0.28), 0.04),
    ("Face", "Face", "Face", (0.0, -0.37), (0.0, -0.35), 0.11),
    ("Hair", "Hair", "-", (-0.05, -0.43), (0.05, -0.43), 0.06),
    ("Bag", "Bag", "-", (0.24, 0.14), (0.26, 0.20), 0.06),
)


def person_maps(
    height: int, width: int, seed: int, skirt: bool = False, coat: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DensePose, LIP and ATR label maps of a drawn person, uint8 [height, width] each.

    The three maps do not agree to the pixel, as those of real parsers. `skirt` and `coat` change
    the clothes.
    """
    from frugal.kernels.masks.labels import ATR, DENSEPOSE, LIP

    rng = np.random.default_rng(seed)
    maps = []
    pose = rng.normal(0, 0.012, (len(BODY), 4))
    for which, names in ((2, DENSEPOSE), (0, LIP), (1, ATR)):
        canvas = np.zeros((height, width), np.uint8)
        for part, move in zip(BODY, pose, strict=True):
            name = part[which]
            if skirt and name == "Pants":
                name = "Skirt"
            if coat and which == 0 and "arm" in part[2] and name == "Upper-clothes":
                name = "Coat"
            if name not in names:
                continue
            ends = np.array([*part[3], *part[4]]) + move + rng.normal(0, 0.003, 4)
            x0, y0, x1, y1 = (ends * height + np.tile((width / 2, height / 2), 2)).astype(int)
            thickness = max(1, int(part[5] * height))
            cv2.line(canvas, (x0, y0), (x1, y1), names.index(name), thickness)
        maps.append(canvas)
    return maps[0], maps[1], maps[2]


def odd(number: int) -> int:
    return number | 1


def opencv_agnostic(dense: np.ndarray, lip: np.ndarray, atr: np.ndarray, part: str) -> np.ndarray:
    """The agnostic mask as OpenCV users write it: one comparison for each label, contours for the
    hulls, an 8-bit blur. uint8 [H, W] of 0 and 255.
    """
    from frugal.kernels.masks.labels import ATR, DENSEPOSE, LIP

    legs, arms = ("Left-leg", "Right-leg"), ("Left-arm", "Right-arm")
    upper = ("Torso", "Left-upper-arm", "Right-upper-arm", "Left-forearm", "Right-forearm")
    lower = ("Left-thigh", "Right-thigh", "Left-calf", "Right-calf")
    body, clothes, target, parts = {
        "upper": (legs, ("Skirt", "Pants"), ("Upper-clothes", "Coat", "Dress", "Jumpsuits"), upper),
        "lower": (
            (*arms, "Face"), ("Upper-clothes", "Coat"), ("Pants", "Skirt", "Dress", "Jumpsuits"),
            lower,
        ),
        "overall": (
            (), (), ("Upper-clothes", "Dress", "Pants", "Skirt", "Coat", "Jumpsuits"),
            upper + lower,
        ),
        "inner": (
            legs, ("Dress", "Coat", "Skirt", "Pants", "Jumpsuits"), ("Upper-clothes",), ("Torso",),
        ),
        "outer": (
            legs, ("Upper-clothes", "Dress", "Skirt", "Pants", "Jumpsuits"), ("Coat",), upper,
        ),
    }[part]  # fmt: skip
    clothes_atr = ("Dress", "Pants", "Skirt") if part == "outer" else clothes

    def of(labels, names, wanted):
        found = np.zeros(labels.shape, bool)
        for number, name in enumerate(names):
            if name in wanted:
                found |= labels == number
        return found

    def parsed(wanted, wanted_atr=None):
        return of(lip, LIP, wanted) | of(atr, ATR, wanted if wanted_atr is None else wanted_atr)

    height, width = lip.shape
    d, k = odd(max(height, width) // 250), odd(max(height, width) // 25)
    square = np.ones((d, d), np.uint8)
    ends = of(dense, DENSEPOSE, ("Left-hand", "Right-hand", "Left-foot", "Right-foot"))
    ends = cv2.dilate(ends.astype(np.uint8), square) > 0
    strong = (ends & parsed(arms + legs)) | of(lip, LIP, ("Face",))
    extras = (
        "Hair", "Hat", "Glove", "Sunglasses", "Bag", "Left-shoe", "Right-shoe", "Scarf", "Socks",
    )  # fmt: skip
    weak = strong | parsed(extras) | parsed(body) | parsed(clothes, clothes_atr)
    background = (lip == 0) & (atr == 0)
    core = of(dense, DENSEPOSE, parts).astype(np.uint8)
    core = cv2.dilate(np.ascontiguousarray(core[::4, ::4]), square, iterations=2)
    core = cv2.resize(core, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)[:height, :width]
    mask = ((~weak & ~background) | (core > 0)).astype(np.uint8)
    hulls = np.zeros_like(mask)
    for contour in cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        cv2.fillPoly(hulls, [cv2.convexHull(contour)], 1)
    hulls[weak] = 0
    blurred = cv2.GaussianBlur(hulls * np.uint8(255), (k, k), 0)
    mask = ((blurred >= 25) | parsed(target)) & ~strong
    return cv2.dilate(mask.astype(np.uint8) * np.uint8(255), square)
