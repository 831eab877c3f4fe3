"""Label maps of people: what the numbers mean, and how they look as pictures.

A parser's answer reaches ComfyUI as an IMAGE, in one of these forms: the label itself as grey
level, DensePose's labels spread over 0..255, the colours of the PASCAL VOC palette (what human
parsers save), or DensePose drawn in viridis or parula. `decode` finds out which it is, and refuses
a picture that is none of them rather than guess.
"""

from __future__ import annotations

import re

import numpy as np

from ..errors import FrugalError

ATR = (
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt",
    "Left-shoe", "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag",
    "Scarf",
)  # fmt: skip
LIP = (
    "Background", "Hat", "Hair", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks",
    "Pants", "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg",
    "Right-leg", "Left-shoe", "Right-shoe",
)  # fmt: skip
DENSEPOSE = (
    "Background", "Torso", "Torso", "Right-hand", "Left-hand", "Right-foot", "Left-foot",
    "Right-thigh", "Left-thigh", "Right-thigh", "Left-thigh", "Right-calf", "Left-calf",
    "Right-calf", "Left-calf", "Left-upper-arm", "Right-upper-arm", "Left-upper-arm",
    "Right-upper-arm", "Left-forearm", "Right-forearm", "Left-forearm", "Right-forearm", "Face",
    "Face",
)  # fmt: skip
MAPS = {"ATR": ATR, "LIP": LIP, "DensePose": DENSEPOSE, "numbers": ()}
ENCODINGS = ("auto", "grey level", "grey x 24 / 255", "VOC colours", "viridis", "parula")
# OpenCV's colour maps at 25 even steps, the way DensePose tools draw labels 0..24.
VIRIDIS = (
    "440154 471063 481f70 472c7a 443983 404688 3b518b 365d8d 31688e 2c718e 287c8e 25858e 21908d "
    "1f9a8a 20a386 27ad81 35b779 46c06f 5cc863 73d056 8ed645 aadc32 c5e021 e2e418 fde725"
)
PARULA = (
    "352a87 253ca3 1450c2 0461df 086edd 0e7ad8 1484d4 0f90d0 0b9ccb 06a6c6 16adb9 26b3ac 37b99f "
    "56bb90 72bd82 91bf74 aabd69 c0bc60 d8ba56 e4c04a f0c73c fcce2e fbdc24 faeb19 f9fb0e"
)
NEAR = 4  # levels; neighbouring colours of both colour maps are at least 9 apart


def voc_palette(count: int) -> np.ndarray:
    """Colours of labels 0..count - 1 in the PASCAL VOC palette, uint8 [count, 3].

    Bit 3 n + c of the label is bit 7 - n of channel c (red, green, blue).
    """
    label = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for n in range(3):
        for c in range(3):
            colours[:, c] |= ((label >> (3 * n + c) & 1) << (7 - n)).astype(np.uint8)
    return colours


def _hex(colours: str) -> np.ndarray:
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.uint8)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] of a float IMAGE [B, H, W, C] (0..1; alpha dropped, grey repeated).

    Raises FrugalError for another shape.
    """
    if picture.ndim != 4 or picture.shape[3] not in (1, 3, 4):
        raise FrugalError(
            f"a label map of shape {list(picture.shape)}",
            "[frames, height, width, 1, 3 or 4 channels]",
            "connect an IMAGE",
        )
    levels = np.multiply(picture[..., :3], np.float32(255), dtype=np.float32)
    levels += np.float32(0.5)
    whole = np.clip(levels, 0, 255, out=levels).astype(np.uint8)
    return np.broadcast_to(whole, (*whole.shape[:3], 3))


def _codes(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct colours, uint8 [n, 3], and the index of every pixel's colour."""
    red = levels[..., 0]
    if np.array_equal(red, levels[..., 1]) and np.array_equal(red, levels[..., 2]):
        grey = np.flatnonzero(np.bincount(red.ravel(), minlength=256))
        place = np.zeros(256, np.int32)
        place[grey] = np.arange(len(grey))
        return np.repeat(grey[:, None], 3, 1).astype(np.uint8), place[red]
    packed = np.ascontiguousarray(levels).astype(np.uint32)
    codes = packed[..., 0] << 16 | packed[..., 1] << 8 | packed[..., 2]
    seen = np.zeros(1 << 24, bool)
    seen[codes.ravel()] = True
    distinct = np.flatnonzero(seen)
    index = np.zeros(1 << 24, np.int32)
    index[distinct] = np.arange(len(distinct))
    colours = np.stack([distinct >> 16, distinct >> 8 & 255, distinct & 255], 1).astype(np.uint8)
    return colours, index[codes]


def _nearest(colours: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Label of each colour, -1 where no table entry is within NEAR levels in every channel."""
    apart = np.abs(colours[:, None].astype(int) - table[None].astype(int)).max(-1)
    label = apart.argmin(1)
    return np.where(apart.min(1) <= NEAR, label, -1)


def _read(colours: np.ndarray, encoding: str, count: int) -> np.ndarray:
    """Label of each colour in one encoding, -1 where it is none."""
    grey = (colours == colours[:, :1]).all(1)
    level = colours[:, 0].astype(int)
    if encoding == "grey level":
        return np.where(grey & (level < count), level, -1)
    if encoding == "grey x 24 / 255":
        label = np.rint(level * 24 / 255).astype(int)
        fits = np.abs(label * 255 / 24 - level) <= 1
        return np.where(grey & fits & (label < count), label, -1)
    if encoding == "VOC colours":
        same = (colours[:, None] == voc_palette(count)[None]).all(-1)
        return np.where(same.any(1), same.argmax(1), -1)
    return _nearest(colours, _hex(VIRIDIS if encoding == "viridis" else PARULA)[:count])


def decode(picture: np.ndarray, kind: str, encoding: str = "auto") -> tuple[np.ndarray, str]:
    """Labels uint8 [B, H, W] of a float IMAGE [B, H, W, C], and the encoding they came in.

    kind: a key of `MAPS`; it says how many labels there are. encoding "auto": the first of
    `ENCODINGS` that explains every pixel; the coloured DensePose forms are tried for DensePose
    only. Raises FrugalError, naming a colour, where none does.
    """
    if kind not in MAPS:
        raise FrugalError(f"map {kind!r}", f"one of {', '.join(MAPS)}", "choose another map")
    if encoding not in ENCODINGS:
        raise FrugalError(
            f"encoding {encoding!r}", f"one of {', '.join(ENCODINGS)}", "choose another encoding"
        )
    count = len(MAPS[kind]) or 256
    colours, index = _codes(to_bytes(picture))
    tried = (encoding,) if encoding != "auto" else ENCODINGS[1:]
    if encoding == "auto" and kind != "DensePose":
        tried = ("grey level", "VOC colours")
    unknown: np.ndarray = colours
    for form in tried:
        label = _read(colours, form, count)
        if (label >= 0).all():
            return label.astype(np.uint8)[index], form
        unknown = colours[label < 0]
    red, green, blue = unknown[0]
    raise FrugalError(
        f"the colour #{red:02x}{green:02x}{blue:02x} in a {kind} map read as {' or '.join(tried)}",
        f"labels 0 to {count - 1} without smoothing or compression",
        "choose the right map and encoding, and resize label maps with nearest only",
    )


def part_ids(kind: str, parts: str) -> list[int]:
    """Label numbers of a list such as "Upper-clothes, Dress" or "4, 7-9"; names as in `MAPS`, in
    any case, a space or _ for the hyphen. "Arm" alone stands for Left-arm and Right-arm.

    Raises FrugalError for a name or number that the map does not have, or an empty list.
    """
    names = [name.lower() for name in MAPS[kind]]
    count = len(names) or 256
    found: set[int] = set()
    for part in (piece.strip() for piece in parts.split(",")):
        if not part:
            continue
        word = re.sub(r"[\s_]+", "-", part.lower())
        number = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if number:
            low, high = int(number[1]), int(number[2] or number[1])
            ids = range(low, high + 1) if low <= high < count else ()
        else:
            sides = (word, f"left-{word}", f"right-{word}")
            ids = [n for n, name in enumerate(names) if name in sides]
        if not ids:
            known = ", ".join(dict.fromkeys(MAPS[kind])) if names else "numbers 0 to 255"
            raise FrugalError(
                f"the part '{part}' in a {kind} map", f"one of {known}", "correct the list of parts"
            )
        found.update(ids)
    if not found:
        raise FrugalError("an empty list of parts", "at least one part", "name a part")
    return sorted(found)


def select(labels: np.ndarray, ids: list[int]) -> np.ndarray:
    """Mask of the pixels whose label is one of `ids`: float32 0 and 1, shape of uint8 `labels`."""
    table = np.zeros(256, np.float32)
    table[ids] = 1
    return table[labels]


def select_colours(picture: np.ndarray, colours: str) -> np.ndarray:
    """Mask [B, H, W] of the pixels of exactly these colours, such as "#ff0000, #00ff00".

    picture: float IMAGE [B, H, W, C]. Raises FrugalError for anything but #rrggbb.
    """
    levels = to_bytes(picture)
    out = np.zeros(levels.shape[:3], np.float32)
    wanted = [piece.strip() for piece in colours.split(",") if piece.strip()]
    for colour in wanted or [""]:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
            raise FrugalError(f"the colour '{colour}'", "#rrggbb", "correct the list of colours")
        out[(levels == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(-1)] = 1
    return out
