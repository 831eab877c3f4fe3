"""What the mask benchmark compares: our calls, and what others would write for the same result.

Peers are at their best settings. OpenCV runs a clip on one thread for each frame and a picture on
its own threads; ComfyUI's and KJNodes' rules are written here from what their nodes document, with
the same library calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

from .mask_scenes import opencv_agnostic, person_maps

THREADS, GROW, FEATHER, ISLAND = 2, 16, 12, 200
# Peers that take a second and more for a clip are timed on its first frames, and ours with them.
SLOW_FRAMES = 9
Runner = Callable[[], np.ndarray]


def over_frames(one):
    """The contender that runs `one(frame, out)` over a clip on THREADS threads."""

    def run(clip: np.ndarray) -> np.ndarray:
        out = np.empty_like(clip)
        if len(clip) == 1:
            cv2.setNumThreads(THREADS)
            one(clip[0], out[0])
            return out
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, clip, out))
        return out

    return run


def disk() -> np.ndarray:
    y, x = np.mgrid[-GROW : GROW + 1, -GROW : GROW + 1]
    return (y * y + x * x <= GROW * GROW).astype(np.uint8)


def opencv_bits(frame: np.ndarray) -> np.ndarray:
    return cv2.threshold(frame, 0.5, 255, cv2.THRESH_BINARY)[1].astype(np.uint8)


def opencv_clean(frame: np.ndarray, island: float = ISLAND) -> np.ndarray:
    """Fill and drop by outer contours: the fastest way in OpenCV."""
    bits = opencv_bits(frame)
    contours, _ = cv2.findContours(bits, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    bits[:] = 0
    kept = [c for c in contours if cv2.contourArea(c) >= island] if island else contours
    return cv2.drawContours(bits, kept, -1, 255, cv2.FILLED)


def opencv_components(frame: np.ndarray) -> np.ndarray:
    """Fill by flooding the outside, drop by labels and their counts."""
    bits = opencv_bits(frame)
    framed = cv2.copyMakeBorder(bits, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(framed, None, (0, 0), 128)
    bits[framed[1:-1, 1:-1] == 0] = 255
    _, labels = cv2.connectedComponents(bits, connectivity=8, ltype=cv2.CV_32S)
    stays = np.bincount(labels.ravel()) >= ISLAND
    stays[0] = False
    return np.where(stays[labels], np.uint8(255), np.uint8(0))


def opencv_blur(frame: np.ndarray, out: np.ndarray) -> None:
    """Peer A: contour clean, dilation by a disk, three float32 box blurs of the same widths."""
    from frugal.kernels.masks.settings import box_widths

    value = cv2.dilate(opencv_clean(frame), disk()).astype(np.float32) * np.float32(1 / 255)
    for width in box_widths(FEATHER):
        value = cv2.blur(value, (width, width), borderType=cv2.BORDER_REPLICATE)
    out[:] = value


def opencv_gaussian(frame: np.ndarray, out: np.ndarray) -> None:
    """Peer C: as A, with OpenCV's own Gaussian of 73 px."""
    value = cv2.dilate(opencv_clean(frame), disk()).astype(np.float32) * np.float32(1 / 255)
    cv2.GaussianBlur(value, (73, 73), FEATHER, dst=out, borderType=cv2.BORDER_REPLICATE)


def _opencv_ramp(mask_size: int):
    def run(frame: np.ndarray, out: np.ndarray) -> None:
        far = cv2.distanceTransform(255 - opencv_clean(frame), cv2.DIST_L2, mask_size)
        np.clip(1 - (far - GROW) * np.float32(1 / FEATHER), 0, 1, out=out)

    return run


def core_nodes() -> dict[str, Callable]:
    """ComfyUI's own mask nodes as functions of tensors, from the ComfyUI on the import path."""
    shipped = importlib.import_module("comfy_extras.nodes_mask")

    def first(made):
        return made[0] if isinstance(made, tuple) else made.result[0]

    return {
        "threshold": lambda m: first(shipped.ThresholdMask().image_to_mask(m, 0.5)),
        "grow": lambda m: first(shipped.GrowMask().expand_mask(m, GROW, True)),
        "feather": lambda m: first(shipped.FeatherMask().feather(m, *[FEATHER] * 4)),
        "invert": lambda m: first(shipped.InvertMask().invert(m)),
    }


def core_grow(clip: np.ndarray) -> np.ndarray:
    """ComfyUI's Grow Mask, as shipped."""
    return core_nodes()["grow"](torch.from_numpy(clip)).numpy()


def core_chain(clip: np.ndarray) -> np.ndarray:
    """What ComfyUI ships of the chain: threshold, grow by a diamond, feather, and the inverse.

    It has no holes, no islands, and its feather fades the borders of the picture instead of the
    mask's edge: less work than the chain does, and another result.
    """
    core, mask = core_nodes(), torch.from_numpy(clip)
    mask = core["feather"](core["grow"](core["threshold"](mask)))
    core["invert"](mask)
    return mask.numpy()


def kj_grow_blur(frame: np.ndarray, out: np.ndarray) -> None:
    """KJNodes' GrowMaskWithBlur on the CPU, by its documented rule: GROW dilations of 3 x 3 with
    kornia's tapered kernel, holes filled by SciPy, Gaussian blur by Pillow in 8 bits, the inverse.
    """
    from kornia.morphology import dilation

    kernel = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])
    mask = torch.from_numpy(frame)[None, None]
    for _ in range(GROW):
        mask = dilation(mask, kernel)
    filled = ndimage.binary_fill_holes(mask[0, 0].numpy() > 0)
    picture = Image.fromarray(filled.astype(np.uint8) * np.uint8(255))
    picture = picture.filter(ImageFilter.GaussianBlur(FEATHER))
    np.multiply(np.asarray(picture), np.float32(1 / 255), out=out)
    np.subtract(np.float32(1), out)


def per_frame_python(dense: np.ndarray, lip: np.ndarray, atr: np.ndarray) -> np.ndarray:
    """A try-on request's pre-processing as plain NumPy, SciPy and Pillow steps: agnostic mask by
    label comparisons, then grow, fill and blur.
    """
    mask = opencv_agnostic(dense, lip, atr, "upper") > 0
    mask = ndimage.binary_fill_holes(ndimage.binary_dilation(mask, disk() > 0))
    picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    blurred = picture.filter(ImageFilter.GaussianBlur(FEATHER))
    return np.asarray(blurred, np.float32) * np.float32(1 / 255)


def copy(clip: np.ndarray) -> np.ndarray:
    out = np.empty_like(clip)
    np.copyto(out, clip)
    return out


def chains(clip: np.ndarray, slow: str) -> tuple[dict[str, Runner], dict[str, str]]:
    """Contenders of the whole chain on one clip, and which of ours each peer is compared with.

    slow: what to add on the clip's first frames: "" nothing, "kj" KJNodes' node, "core" that and
    ComfyUI's own nodes.
    """
    from frugal.kernels.masks.refine import RefineSettings, refine, refine_both

    clean = dict(fill_holes=-1, drop_islands=ISLAND)

    def ours(frames=clip, **settings):
        chosen = RefineSettings(**settings)
        return lambda: refine(frames, chosen, threads=THREADS)

    runners: dict[str, Runner] = {
        "numba gaussian": ours(**clean, grow=GROW, feather=FEATHER, feather_mode="gaussian"),
        "opencv A": lambda: over_frames(opencv_blur)(clip),
        "opencv C": lambda: over_frames(opencv_gaussian)(clip),
        "numba ramp": ours(**clean, grow=GROW, feather=FEATHER),
        "opencv E": lambda: over_frames(_opencv_ramp(cv2.DIST_MASK_PRECISE))(clip),
        "opencv F": lambda: over_frames(_opencv_ramp(cv2.DIST_MASK_5))(clip),
        "copy": lambda: copy(clip),
    }
    pairs = {"opencv A": "numba gaussian", "opencv C": "numba gaussian"}
    pairs |= {"opencv E": "numba ramp", "opencv F": "numba ramp"}
    if not slow:
        return runners, pairs
    few = clip[:SLOW_FRAMES]
    chain = RefineSettings(**clean, grow=GROW, feather=FEATHER, feather_mode="gaussian")
    runners |= {
        "numba chain + inverse": lambda: refine_both(few, chain, threads=THREADS)[0],
        "numba grow": ours(few, grow=GROW, grow_shape="diamond"),
        "kj grow + fill + blur": lambda: over_frames(kj_grow_blur)(few),
    }
    pairs["kj grow + fill + blur"] = "numba chain + inverse"
    if slow == "core":
        runners |= {
            "core grow": lambda: core_grow(few),
            "core chain": lambda: core_chain(few),
        }
        pairs |= {"core grow": "numba grow", "core chain": "numba chain + inverse"}
    return runners, pairs


def operations(figure: np.ndarray, clip: np.ndarray) -> tuple[dict[str, Runner], dict[str, str]]:
    """Contenders of single operations on a picture [1, H, W] and a clip; pairs as of `chains`."""
    from frugal.kernels.masks import bits, morphology, numba_chain
    from frugal.kernels.masks.agnostic import AgnosticSettings, agnostic_mask
    from frugal.kernels.masks.pictures import composite
    from frugal.kernels.masks.refine import RefineSettings, hull, refine

    frame = figure[0]
    height, width = frame.shape
    byte = (frame > 0.5).astype(np.uint8)
    rng = np.random.default_rng(3)
    grey = ndimage.gaussian_filter(rng.random(frame.shape, np.float32), 1)
    noise = rng.random((1, *frame.shape), np.float32)
    maps = person_maps(height, width, 0)
    batch = [labels[None] for labels in maps]
    below = rng.random((*clip.shape, 3), np.float32)
    above = below[::-1].copy()
    soft = refine(clip, RefineSettings(feather=FEATHER))
    words = np.empty((-(-height // 64), width), np.uint64)
    row = np.empty(width, np.uint8)
    scratch = numba_chain.Scratch()
    profile = morphology.profile("disk", GROW)

    def ours(frames=figure, **settings):
        chosen = RefineSettings(**settings)
        return lambda: refine(frames, chosen, threads=THREADS)

    def disk_bytes() -> np.ndarray:
        out = np.empty_like(byte)
        bits.pack(byte, np.uint8(0), words, row, 0, len(words))
        run = lambda tasks: [task(scratch) for task in tasks] and None  # noqa: E731
        numba_chain.dilate(words, height, profile, scratch, 1, run)
        bits.unpack_bytes(words, out, False, row, 0, height)
        return out

    def core_composite() -> np.ndarray:
        d, s = torch.from_numpy(below).clone().movedim(-1, 1), torch.from_numpy(above)
        mask = torch.from_numpy(soft)[:, None].clone()
        mixed = mask * s.movedim(-1, 1) + (torch.ones_like(mask) - mask) * d
        d[...] = mixed
        return d.movedim(1, -1).numpy()

    def request() -> np.ndarray:
        mask = agnostic_mask(*batch, AgnosticSettings("upper"), threads=THREADS)
        chosen = RefineSettings(fill_holes=-1, grow=GROW, feather=FEATHER, feather_mode="gaussian")
        return refine(mask, chosen, threads=THREADS)

    def lerp() -> np.ndarray:
        weight = torch.from_numpy(soft)[..., None]
        return torch.lerp(torch.from_numpy(below), torch.from_numpy(above), weight).numpy()

    def filled(f: np.ndarray) -> np.ndarray:
        return opencv_clean(f, 0).astype(np.float32) * np.float32(1 / 255)

    def hulls_cv2() -> np.ndarray:
        bits = opencv_bits(frame)
        out = np.zeros_like(bits)
        for contour in cv2.findContours(bits, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
            cv2.fillPoly(out, [cv2.convexHull(contour)], 1)
        return out.astype(np.float32)

    square = np.ones((2 * GROW + 1, 2 * GROW + 1), np.uint8)
    clean = dict(fill_holes=-1, drop_islands=ISLAND)
    scale = np.float32(1 / 255)
    runners: dict[str, Runner] = {
        "numba disk u8": disk_bytes,
        "cv2 disk u8": lambda: cv2.dilate(byte, disk()),
        "numba grey disk": ours(grey[None], threshold=0, grow=GROW),
        "cv2 grey disk": lambda: cv2.dilate(grey, disk()),
        "numba grey square": ours(grey[None], threshold=0, grow=GROW, grow_shape="square"),
        "cv2 grey square": lambda: cv2.dilate(grey, square),
        "numba fill": ours(fill_holes=-1),
        "cv2 contour fill": lambda: filled(frame),
        "numba holes + islands": ours(**clean),
        "cv2 flood + components": lambda: opencv_components(frame) * scale,
        "numba holes + islands, noise": ours(noise, **clean),
        "cv2 flood + components, noise (faster there)": lambda: opencv_components(noise[0]) * scale,
        "numba hulls": lambda: hull(figure, "per_region", threads=THREADS),
        "cv2 hulls": hulls_cv2,
        "numba agnostic": lambda: agnostic_mask(*batch, AgnosticSettings(), threads=THREADS),
        "cv2 agnostic": lambda: opencv_agnostic(*maps, "upper"),
        "numba composite": lambda: composite(below, above, soft, threads=THREADS),
        "core composite": core_composite,
        "torch.lerp": lerp,
        "numba median3": ours(clip, threshold=0, temporal="median3"),
        "numba ema": ours(clip, threshold=0, temporal="ema"),
        "copy of the clip": lambda: over_frames(lambda frame, out: np.copyto(out, frame))(clip),
        "copy of the clip, 1 thread": lambda: copy(clip),
        "numba request": request,
        "per-frame Python request": lambda: per_frame_python(*maps),
    }
    names = list(runners)
    pairs = {peer: own for own, peer in zip(names[:18:2], names[1:18:2], strict=True)}
    pairs |= {"torch.lerp": "numba composite", "numba median3": "copy of the clip"}
    pairs |= {"numba ema": "copy of the clip", "per-frame Python request": "numba request"}
    return runners, pairs
