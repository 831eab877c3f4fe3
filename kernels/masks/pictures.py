"""Masks applied to pictures: compositing, and a crop window that follows a mask through a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import FrugalError
from . import dispatch, pages
from .pool import Progress
from .refine import boxes, frames_of
from .values import bounded

FOLLOW = ("union", "follow")
PAINT = "paint the mask: right-click the Load Image node, 'Open in MaskEditor'"
MAX_MULTIPLE = 256


def pictures_of(picture: np.ndarray, name: str) -> np.ndarray:
    """float32 C-contiguous [B, H, W, C] of a float picture; `name` is for the message.

    Raises FrugalError for another type, number of axes, or an empty side.
    """
    if not isinstance(picture, np.ndarray) or picture.dtype.kind != "f":
        found = picture.dtype if isinstance(picture, np.ndarray) else type(picture).__name__
        raise FrugalError(f"{name} of type {found}", "a float array", "connect an IMAGE")
    if picture.ndim != 4 or 0 in picture.shape[1:]:
        raise FrugalError(
            f"{name} of shape {list(picture.shape)}",
            "[frames, height, width, channels], none of them 0",
            "connect an IMAGE, not a mask or a latent",
        )
    return np.ascontiguousarray(picture, np.float32)


def _common(**counts: int) -> int:
    """The one number of frames besides 1."""
    several = {name: count for name, count in counts.items() if count != 1}
    if len(set(several.values())) > 1:
        raise FrugalError(
            ", ".join(f"{name} of {count} frames" for name, count in several.items()),
            "equal numbers of frames, or 1 to repeat",
            "cut or repeat the shorter batch first",
        )
    return next(iter(several.values()), 1)


def composite(
    destination: np.ndarray,
    source: np.ndarray,
    mask: np.ndarray,
    x: int | np.ndarray = 0,
    y: int | np.ndarray = 0,
    progress: Progress | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """mask source + (1 - mask) destination, as a new float32 [B, H, W, C].

    destination: float [B, H, W, C]. source: float [B, h, w, C] with its corner at (x, y) px of the
    destination, one place or one for each frame; what sticks out is cut off. mask: float [B, h, w]
    of the source's size, values as for `refine.refine`. A source with other channels than the
    destination loses its alpha or gets one of 1. A batch of 1 repeats. Where the mask is 0 the
    result holds the destination's bits and where it is 1 the source's. progress, threads: as of
    `refine.refine`. Raises FrugalError for sizes, channels or frame counts that do not fit.
    """
    under, over = pictures_of(destination, "destination"), pictures_of(source, "source")
    over = _with_channels(over, under.shape[3])
    weight = bounded(frames_of(mask))
    if weight.shape[1:] != over.shape[1:3]:
        # Load Image gives an empty mask of 64 x 64 px beside a picture that nobody painted on.
        raise FrugalError(
            f"a mask of {weight.shape[2]} x {weight.shape[1]} px and a source of "
            f"{over.shape[2]} x {over.shape[1]} px",
            "equal sizes",
            "resize the mask or the source first" if weight.any() else PAINT,
        )
    xs, ys = np.atleast_1d(x), np.atleast_1d(y)
    count = _common(
        destination=len(under), source=len(over), mask=len(weight), places=max(len(xs), len(ys))
    )
    return dispatch.run_composite(under, over, weight, xs, ys, count, progress, threads)


def _with_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    """[B, H, W, 3 or 4] with `channels`, 3 or 4: alpha left out, or added as 1."""
    found = picture.shape[3]
    if found == channels:
        return picture
    if {found, channels} != {3, 4}:
        raise FrugalError(
            f"a source of {found} and a destination of {channels} channels",
            "equal numbers of channels, or RGB and RGBA",
            "convert one of the two",
        )
    if found == 4:
        return np.ascontiguousarray(picture[..., :3])
    return np.pad(picture, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)


@dataclass(frozen=True)
class Window:
    """Where a crop came from. corners: int64 [B, 2] of x, y in px, outside the picture where the
    window is larger than it; size: width, height of the window; picture: width, height of the
    picture.
    """

    corners: np.ndarray
    size: tuple[int, int]
    picture: tuple[int, int]

    def text(self) -> str:
        """One line for the node."""
        x, y = self.corners.T
        place = f"x {x.min()}..{x.max()}, y {y.min()}..{y.max()}"
        width, height = self.picture
        return f"window {self.size[0]} x {self.size[1]} px at {place} of {width} x {height} px"


def window(
    mask: np.ndarray,
    context: float = 1.2,
    multiple: int = 16,
    mode: str = "follow",
    smoothing: float = 4.0,
) -> Window:
    """One window size for the whole clip that holds the mask of every frame.

    mask: float [B, H, W]; a value above 0 belongs to it. context: the window's sides as a multiple
    of the largest box's, 1 to 10. multiple: the sides are rounded up to a multiple of this many
    px. mode "union": one place, round the mask of all frames. "follow": the window moves with the
    mask, its centre smoothed over frames by a Gaussian of `smoothing` frames (0: off), but never
    so far that it loses the frame's mask; a frame with an empty mask keeps the last box, and
    before the first box the first one. The window stays inside the picture where it fits. Raises
    FrugalError for a clip without any mask, or a setting out of range.
    """
    if mode not in FOLLOW:
        raise FrugalError(f"mode {mode!r}", f"one of {', '.join(FOLLOW)}", "choose another mode")
    for name, value, low, high in (
        ("context", context, 1, 10),
        ("multiple", multiple, 1, MAX_MULTIPLE),
        ("smoothing", smoothing, 0, 1000),
    ):
        if not low <= value <= high:
            raise FrugalError(
                f"{name} {value}", f"{low} to {high}", f"set {name} inside that range"
            )
    frames = frames_of(mask)
    found = boxes(frames)
    seen = np.flatnonzero(found[:, 2])
    if not len(seen):
        raise FrugalError(
            f"a mask that is empty in all of its {len(frames)} frames",
            "something to crop around",
            f"{PAINT}, or bypass the crop",
        )
    last = np.maximum.accumulate(np.where(found[:, 2] > 0, np.arange(len(found)), -1))
    held = found[np.where(last < 0, seen[0], last)]
    low, high = held[:, :2], held[:, :2] + held[:, 2:]
    if mode == "union":
        low, high = low.min(0, keepdims=True), high.max(0, keepdims=True)
        low, high = (np.repeat(side, len(frames), axis=0) for side in (low, high))
    picture = np.array(frames.shape[:0:-1])
    wanted = np.ceil((high - low).max(0) * context).astype(np.int64)
    size = -(-np.minimum(wanted, np.maximum(picture, (high - low).max(0))) // multiple) * multiple
    centre = _smooth((low + high) / 2, smoothing if mode == "follow" else 0)
    corner = np.rint(centre - size / 2).astype(np.int64)
    corner = np.clip(corner, high - size, low)
    fits = size <= picture
    corner = np.where(
        fits, np.clip(corner, 0, np.maximum(picture - size, 0)), (picture - size) // 2
    )
    width, height = (int(side) for side in size)
    return Window(corner, (width, height), (int(picture[0]), int(picture[1])))


def _smooth(track: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the first axis of float64 [B, 2], ends repeated."""
    if not sigma or len(track) == 1:
        return track
    reach = int(np.ceil(3 * sigma))
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(track, ((reach, reach), (0, 0)), mode="edge")
    columns = [np.convolve(column, weight / weight.sum(), "valid") for column in padded.T]
    return np.stack(columns, axis=1)


def crop(frames: np.ndarray, where: Window, outside: str) -> np.ndarray:
    """The window of every frame, float32 [B, h, w, ...] of float [B, H, W, ...]; one frame repeats.

    outside: what a window larger than the picture holds beyond it, "edge" (the border repeated) or
    "zero". Raises FrugalError where size or number of frames is another than the window's.
    """
    _fits(frames, where, "picture")
    count = _common(picture=len(frames), window=len(where.corners))
    width, height = where.size
    out = pages.fresh((count, height, width, *frames.shape[3:]))
    for n in range(count):
        x, y = (int(place) for place in where.corners[n % len(where.corners)])
        frame = frames[n % len(frames)]
        rows, columns = np.arange(y, y + height), np.arange(x, x + width)
        in_rows = (rows >= 0) & (rows < where.picture[1])
        in_columns = (columns >= 0) & (columns < where.picture[0])
        if in_rows.all() and in_columns.all():
            out[n] = frame[y : y + height, x : x + width]
            continue
        rows = rows.clip(0, where.picture[1] - 1)
        out[n] = frame[rows][:, columns.clip(0, where.picture[0] - 1)]
        if outside == "zero":
            out[n][~in_rows] = 0
            out[n][:, ~in_columns] = 0
    return out


def _fits(frames: np.ndarray, where: Window, name: str) -> None:
    height, width = frames.shape[1:3]
    if (width, height) != where.picture:
        raise FrugalError(
            f"a {name} of {width} x {height} px",
            f"{where.picture[0]} x {where.picture[1]} px as the picture that was cropped",
            "connect the same picture as at the crop",
        )


def uncrop(
    destination: np.ndarray,
    cropped: np.ndarray,
    where: Window,
    mask: np.ndarray | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Put cropped frames back: a new float32 [B, H, W, C] that is bit-identical to `destination`
    outside the window, and where the mask is 0.

    destination: float [B, H, W, C] of the picture's size; cropped: float [B, h, w, C] of the
    window's size; mask: float [B, h, w], None for the whole window. Raises FrugalError where a
    size or number of frames does not fit.
    """
    under, over = pictures_of(destination, "destination"), pictures_of(cropped, "cropped image")
    _fits(under, where, "destination")
    if over.shape[2:0:-1] != where.size:
        raise FrugalError(
            f"a cropped image of {over.shape[2]} x {over.shape[1]} px",
            f"{where.size[0]} x {where.size[1]} px as the window",
            "resize it to the window's size",
        )
    if mask is None:
        mask = np.ones((1, *over.shape[1:3]), np.float32)
    x, y = where.corners.T
    return composite(under, over, mask, x, y, progress, threads)
