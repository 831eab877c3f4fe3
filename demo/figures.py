"""Drawn people and garments: the only training and test data of the demo try-on model.

Everything is a signed distance function evaluated on a pixel grid, so the same figure can be drawn
at any size without another renderer. A garment is a cut plus a texture in its own (u, v) space; the
flat picture and the worn one sample that same texture, which makes an exact ground truth for every
swap ("person A wearing garment B"). No outside picture, font or palette is used.

Units: one drawing unit is one pixel of the 128 x 192 default canvas; `scale` multiplies it.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 128, 192
PATTERNS = (
    "plain",
    "hstripes",
    "vstripes",
    "diagonal",
    "halves_lr",
    "halves_tb",
    "checks",
    "yoke",
    "glyph",
)
_PATTERN_SHARE = (0.20, 0.19, 0.13, 0.08, 0.09, 0.09, 0.11, 0.05, 0.06)
_SKINS = ((250, 218, 190), (232, 184, 148), (205, 148, 108), (158, 104, 70), (98, 62, 42))
_HAIRS = ((28, 22, 22), (74, 46, 28), (122, 78, 40), (196, 156, 92), (140, 52, 30), (128, 128, 132))


@dataclass(frozen=True)
class Garment:
    """Cut and texture of one garment; lengths in drawing units, colours in 0..255 RGB."""

    pattern: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    bands: tuple[int, int]
    phase: float
    sleeve: float
    neck: float
    hem: float
    shade: float


@dataclass(frozen=True)
class Person:
    """Pose and surroundings of one figure; angles in radians, lengths in drawing units."""

    x: float
    top: float
    bottom: float
    shoulder: float
    arms: tuple[tuple[float, float], tuple[float, float]]
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    long_hair: bool
    trousers: tuple[int, int, int]
    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    margin: float


def _rgb(h: float, s: float, v: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return round(r * 255), round(g * 255), round(b * 255)


def _cloth_color(rng: np.random.Generator) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.12:
        return _rgb(rng.random(), 0.04, rng.uniform(0.92, 1.0))
    if kind < 0.24:
        return _rgb(rng.random(), 0.15, rng.uniform(0.06, 0.16))
    return _rgb(rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.55, 0.97))


def random_garment(rng: np.random.Generator) -> Garment:
    """Parameters of one garment; its two colours are at least 180 apart (summed over RGB)."""
    first = _cloth_color(rng)
    second = _cloth_color(rng)
    while sum(abs(a - b) for a, b in zip(first, second, strict=True)) < 180:
        second = _cloth_color(rng)
    return Garment(
        pattern=str(rng.choice(PATTERNS, p=_PATTERN_SHARE)),
        colors=(first, second),
        bands=(int(rng.integers(2, 4)), int(rng.integers(2, 5))),
        phase=float(rng.uniform(0, 1)),
        sleeve=float(rng.choice((0.0, 0.42, 0.92), p=(0.2, 0.5, 0.3))),
        neck=float(rng.uniform(5, 9)),
        hem=float(rng.uniform(-1.5, 2.0)),
        shade=float(rng.uniform(-0.05, 0.05)),
    )


def random_person(rng: np.random.Generator) -> Person:
    """Draw the parameters of one figure, standing near the middle of the canvas."""
    top = float(rng.uniform(55, 61))
    hue, value = rng.random(), rng.uniform(0.45, 0.9)
    trousers = _rgb(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.6))
    return Person(
        x=64 + float(rng.uniform(-5, 5)),
        top=top,
        bottom=top + float(rng.uniform(62, 70)),
        shoulder=float(rng.uniform(20, 24)),
        arms=tuple(
            (float(rng.uniform(0.12, 0.55)), float(rng.uniform(-0.25, 0.45))) for _ in range(2)
        ),  # type: ignore[arg-type]
        skin=_SKINS[rng.integers(len(_SKINS))],
        hair=_HAIRS[rng.integers(len(_HAIRS))],
        long_hair=bool(rng.random() < 0.5),
        trousers=trousers,
        ground=(
            _rgb(hue, rng.uniform(0.1, 0.45), value),
            _rgb(hue + rng.uniform(-0.1, 0.1), 0.3, value * 0.75),
        ),
        margin=float(rng.uniform(3.5, 7.0)),
    )


def texture(garment: Garment, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the second colour at garment coordinates; u in -1..1 across, v in 0..1 from neck to
    hem.
    """
    across, down = garment.bands
    if garment.pattern == "hstripes":
        return _bands(v * down + garment.phase, 14.0)
    if garment.pattern == "vstripes":
        return _bands((u + 1) * 0.5 * across + garment.phase, 12.0)
    if garment.pattern == "diagonal":
        return _bands(v * down * 0.75 + u * 1.1 + garment.phase, 12.0)
    if garment.pattern == "halves_lr":
        return _step(u * 20)
    if garment.pattern == "halves_tb":
        return _step((v - 0.35 - 0.3 * garment.phase) * 60)
    if garment.pattern == "checks":
        a = _bands((u + 1) * 0.5 * across + 0.25, 11.0)
        b = _bands(v * down * 0.8 + garment.phase, 14.0)
        return a + b - 2 * a * b
    if garment.pattern == "yoke":
        return _step((0.3 - v) * 60)
    if garment.pattern == "glyph":
        return _glyph(garment, u * 22, (v - 0.42) * 64)
    return np.zeros_like(u)


def _step(d: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + d, 0.0, 1.0)


def _bands(t: np.ndarray, sharp: float) -> np.ndarray:
    """Alternating bands of period 1 with edges about one pixel soft."""
    return _step((np.abs((t % 1.0) - 0.5) - 0.25) * sharp)


def _glyph(garment: Garment, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One of four marks of our own: disc, ring, lozenge, bar."""
    kind = garment.bands[0] * 3 + garment.bands[1]
    radius = np.hypot(x, y)
    shapes = (
        radius - 12,
        np.abs(radius - 10) - 4,
        np.abs(x) + np.abs(y) - 15,
        np.maximum(np.abs(x) - 15, np.abs(y) - 6),
    )
    return _step(-shapes[kind % 4])


def _grid(scale: float) -> tuple[np.ndarray, np.ndarray]:
    h, w = round(HEIGHT * scale), round(WIDTH * scale)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    return (x + 0.5) / scale, (y + 0.5) / scale


def _capsule(x, y, a, b, r0: float, r1: float):
    """Distance to a tapered limb from a to b, and the coordinates along (0..1) and across (-1..1)
    it.
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = ((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)
    tc = np.clip(t, 0.0, 1.0)
    px, py = x - a[0] - tc * dx, y - a[1] - tc * dy
    r = r0 + (r1 - r0) * tc
    side = ((x - a[0]) * dy - (y - a[1]) * dx) / np.hypot(dx, dy) / r
    return np.hypot(px, py) - r, t, side


def _torso(garment: Garment, x, y, cx: float, top: float, bottom: float, shoulder: float):
    """Distance to the garment's body, and its texture coordinates (u, v)."""
    v = (y - top) / (bottom - top)
    half = shoulder * (1 - 0.16 * np.clip(v, 0, 1)) + garment.hem * np.clip(v, 0, 1)
    u = (x - cx) / half
    body = np.maximum(
        np.abs(x - cx) - half, np.maximum(top + 0.18 * np.abs(x - cx) - y, y - bottom)
    )
    neck = np.hypot((x - cx) / 1.15, y - top) - garment.neck
    return np.maximum(body, -neck), u, v


def _paint(img: np.ndarray, d: np.ndarray, color, scale: float) -> None:
    """Blend a colour (3,) or picture (H, W, 3) over img where the distance d is negative, one pixel
    soft.
    """
    a = _step(-d * scale)[..., None]
    img *= 1 - a
    img += a * np.asarray(color, np.float32)


def _fabric(garment: Garment, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a = texture(garment, u, v)[..., None]
    first, second = (np.asarray(c, np.float32) for c in garment.colors)
    fold = 1 + garment.shade * np.sin(3 * u + 4 * v)[..., None]
    return (first * (1 - a) + second * a) * fold


def _sleeve(img, garment: Garment, x, y, shoulder_xy, elbow, hand, side: int, scale: float) -> None:
    if garment.sleeve <= 0:
        return
    reach = garment.sleeve
    upper = min(reach / 0.5, 1.0)
    end = tuple(s + (e - s) * upper for s, e in zip(shoulder_xy, elbow, strict=True))
    parts = [(shoulder_xy, end, 8.0, 7.4, 0.0, 0.5 * upper)]
    if reach > 0.5:
        lower = (reach - 0.5) / 0.5
        parts.append(
            (
                elbow,
                tuple(s + (e - s) * lower for s, e in zip(elbow, hand, strict=True)),
                7.4,
                6.4,
                0.5,
                lower * 0.5,
            )
        )
    for a, b, r0, r1, start, length in parts:
        d, t, across = _capsule(x, y, a, b, r0, r1)
        _paint(
            img,
            d,
            _fabric(
                garment, side * (1.0 - 0.25 * across), (start + length * np.clip(t, 0, 1)) * 0.9
            ),
            scale,
        )


def render_garment(garment: Garment, scale: float = 1.0) -> np.ndarray:
    """The garment laid flat on near-white; returns uint8 [H, W, 3]."""
    x, y = _grid(scale)
    img = np.full((*x.shape, 3), 250, np.float32)
    cx, top, bottom, shoulder = 64.0, 58.0, 124.0, 22.0
    for side in (-1, 1):
        start = (cx + side * (shoulder - 6), top + 9)
        elbow = (start[0] + side * 14, start[1] + 24)
        hand = (elbow[0] + side * 10, elbow[1] + 26)
        _sleeve(img, garment, x, y, start, elbow, hand, side, scale)
    d, u, v = _torso(garment, x, y, cx, top, bottom, shoulder)
    _paint(img, d, _fabric(garment, u, v), scale)
    return np.clip(np.rint(img), 0, 255).astype(np.uint8)


def render_person(
    person: Person, garment: Garment, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The figure wearing the garment, and its try-on mask.

    Returns uint8 [H, W, 3] and a uint8 mask [H, W] of 0 or 255: body and arms down to the wrist,
    grown by the figure's margin and cut below the chin; hands, face and legs stay visible. The mask
    depends on the person alone, so it tells nothing of the garment that is worn.
    """
    x, y = _grid(scale)
    p = person
    ramp = np.clip(y / HEIGHT, 0, 1)[..., None]
    img = (
        np.asarray(p.ground[0], np.float32) * (1 - ramp)
        + np.asarray(p.ground[1], np.float32) * ramp
    )
    chin = p.top - 4
    if p.long_hair:
        _paint(img, _ellipse(x, y, p.x, chin - 9, 15, 20), p.hair, scale)
    for side in (-1, 1):
        d, _, _ = _capsule(x, y, (p.x + side * 8.5, p.bottom - 6), (p.x + side * 10.5, 205), 10, 8)
        _paint(img, d, p.trousers, scale)
    body = np.maximum(
        np.abs(x - p.x) - p.shoulder * 0.86,
        np.maximum(p.top + 0.2 * np.abs(x - p.x) - y, y - p.bottom - 2),
    )
    _paint(img, np.maximum(body, p.bottom - 8 - y), p.trousers, scale)
    _paint(img, np.maximum(body, y - p.bottom + 6), p.skin, scale)
    joints, limbs = [], [body]
    for side, (swing, bend) in zip((-1, 1), p.arms, strict=True):
        start = (p.x + side * (p.shoulder - 6), p.top + 9)
        elbow = (start[0] + side * 27 * np.sin(swing), start[1] + 27 * np.cos(swing))
        hand = (elbow[0] + side * 27 * np.sin(swing + bend), elbow[1] + 27 * np.cos(swing + bend))
        wrist = tuple(e + 0.72 * (h - e) for e, h in zip(elbow, hand, strict=True))
        joints.append((start, elbow, hand, side))
        limbs += [
            _capsule(x, y, start, elbow, 7.5, 6.5)[0],
            _capsule(x, y, elbow, wrist, 6.5, 5.5)[0],
        ]
        _paint(img, _capsule(x, y, start, elbow, 6, 5)[0], p.skin, scale)
        _paint(img, _capsule(x, y, elbow, hand, 5, 4)[0], p.skin, scale)
        _paint(img, np.hypot(x - hand[0], y - hand[1]) - 5.5, p.skin, scale)
    d, u, v = _torso(garment, x, y, p.x, p.top, p.bottom, p.shoulder)
    _paint(img, np.maximum(np.abs(x - p.x) - 5, np.abs(y - p.top) - 8), p.skin, scale)
    _paint(img, d, _fabric(garment, u, v), scale)
    for start, elbow, hand, side in joints:
        _sleeve(img, garment, x, y, start, elbow, hand, side, scale)
    _head(img, p, x, y, chin, scale)
    grown = np.minimum.reduce(limbs) - p.margin
    mask = np.where((grown < 0) & (y > chin + 3), 255, 0).astype(np.uint8)
    return np.clip(np.rint(img), 0, 255).astype(np.uint8), mask


def _ellipse(x, y, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)


def _head(img, p: Person, x, y, chin: float, scale: float) -> None:
    _paint(img, _ellipse(x, y, p.x, chin - 13, 12.5, 15), p.hair, scale)
    _paint(img, np.maximum(_ellipse(x, y, p.x, chin - 11, 10.5, 13), chin - 18 - y), p.skin, scale)
    for side in (-1, 1):
        _paint(img, _ellipse(x, y, p.x + side * 4, chin - 11, 1.4, 1.4), (40, 32, 30), scale)
    _paint(img, _ellipse(x, y, p.x, chin - 4.5, 3.2, 1.0), (150, 60, 60), scale)
