"""The mask graph: a real photo with a hand-made mask, and a mask that moves over it.

`python -m demo.mask_graph OUT` writes the pictures that the graph loads; put them into ComfyUI's
input folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from .graph_builder import Group, Node, Note
from .layout import DEMO

PHOTO, PHOTO_MASK, WALK = (
    "frugal_masks_photo.png",
    "frugal_masks_mask.png",
    "frugal_masks_walk.webp",
)
FRAMES, LOST = 12, 5  # frames of the moving mask, and the one a tracker lost


def photo() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [512, 512, 3] photo (NASA, public domain, of scikit-image), its mask [512, 512]."""
    from skimage import data

    return data.astronaut(), np.asarray(Image.open(DEMO / "photo" / "cloth_mask.png").convert("L"))


def walk() -> np.ndarray:
    """uint8 [12, 512, 512] mask of a drawn figure that crosses the picture, with specks and holes
    that jump from frame to frame, and one frame lost.
    """
    from .data import pair
    from .figures import render_person

    rng = np.random.default_rng(0)
    figure = np.kron(render_person(*pair(1))[1], np.ones((2, 2), np.uint8)) > 0
    height, width = figure.shape
    clip = np.zeros((FRAMES, 512, 512), bool)
    for t in range(FRAMES):
        x, y = round((512 - width) * t / (FRAMES - 1)), round(60 + 20 * np.sin(t))
        clip[t, y : y + height, x : x + width] = figure
        specks = ndimage.gaussian_filter(rng.random((512, 512)), 2)
        clip[t] ^= specks > np.quantile(specks, 0.995)
    clip[LOST] = False
    return clip.astype(np.uint8) * np.uint8(255)


def write_inputs(folder: Path) -> list[Path]:
    """Write the three pictures that the graph loads."""
    picture, mask = photo()
    Image.fromarray(picture).save(folder / PHOTO)
    Image.fromarray(mask).save(folder / PHOTO_MASK)
    frames = [Image.fromarray(frame).convert("RGB") for frame in walk()]
    frames[0].save(
        folder / WALK, save_all=True, append_images=frames[1:], duration=125, lossless=True
    )
    return [folder / name for name in (PHOTO, PHOTO_MASK, WALK)]


def masks_graph() -> dict[str, Node]:
    """Above: refine a photo's mask and composite through it. Below: calm a moving mask, crop around
    it, change the window, put it back.
    """
    tall = (340, 560)
    return {
        "photo": Node("LoadImage", 0, {"image": PHOTO}, title="Photo", size=(340, 340)),
        "mask": Node(
            "LoadImageMask",
            0,
            {"image": PHOTO_MASK, "channel": "red"},
            title="Rough mask of the photo",
            size=(340, 340),
        ),
        "walk": Node(
            "LoadImage", 0, {"image": WALK}, title="Moving mask, 12 frames", size=(340, 340)
        ),
        "walk_mask": Node("ImageToMask", 0, {"channel": "red"}, {"image": ("walk", 0)}),
        "refine": Node(
            "FrugalMaskRefine",
            1,
            {"fill_holes": -1, "drop_islands": 200, "grow": 6, "feather": 10.0},
            {"mask": ("mask", 0)},
            size=(340, 680),
        ),
        "median": Node(
            "FrugalMaskTemporal",
            1,
            {"mode": "median3"},
            {"mask": ("walk_mask", 0)},
            size=(340, 360),
        ),
        "clean": Node(
            "FrugalMaskClean",
            1,
            {"fill_holes": -1, "drop_islands": 500},
            {"mask": ("median", 0)},
            size=(340, 360),
        ),
        "inverse": Node("ImageInvert", 2, {}, {"image": ("photo", 0)}),
        "composite": Node(
            "FrugalMaskComposite",
            2,
            {},
            {"destination": ("photo", 0), "source": ("inverse", 0), "mask": ("refine", 0)},
            title="Changed inside the mask only",
            size=tall,
        ),
        "crop": Node(
            "FrugalMaskBBoxCrop",
            2,
            {},
            {"image": ("photo", 0), "mask": ("clean", 0)},
            title="Window that follows the mask",
            size=tall,
        ),
        "work": Node("ImageInvert", 3, {}, {"image": ("crop", 0)}, title="Your model goes here"),
        "seam": Node(
            "FrugalMaskFeather",
            3,
            {"feather": 8.0, "feather_mode": "ramp_in"},
            {"mask": ("crop", 1)},
            title="Soft seam",
            size=(340, 400),
        ),
        "uncrop": Node(
            "FrugalMaskBBoxUncrop",
            3,
            {},
            {
                "destination": ("photo", 0),
                "cropped": ("work", 0),
                "window": ("crop", 2),
                "mask": ("seam", 0),
            },
            size=tall,
        ),
        "save": Node(
            "SaveImage",
            4,
            {"filename_prefix": "frugal/masks_photo"},
            {"images": ("composite", 0)},
            title="The photo, changed",
            size=(340, 420),
        ),
        "save_clip": Node(
            "SaveImage",
            4,
            {"filename_prefix": "frugal/masks_clip"},
            {"images": ("uncrop", 0)},
            title="The clip, put back",
            size=(340, 420),
        ),
    }


GROUPS = [
    Group("1. Photo and masks", 0, 0),
    Group("2. Clean the masks", 1, 1, "#3f9e6b"),
    Group("3. Composite or crop", 2, 2, "#9e6b3f"),
    Group("4. Work on the window and put it back", 3, 4, "#6b3f9e"),
]
NOTE = Note(
    f"""## Masks for photos and clips

Everything runs on the CPU and is previewed on its node. The images are written by
`python -m demo.mask_graph FOLDER`; or choose your own: a photo, its mask, and a clip of masks.

- `{PHOTO}`, `{PHOTO_MASK}`: a photo and its rough mask
- `{WALK}`: 12 frames; one is missing and specks flicker, which the median over time repairs

Outside the mask the photo comes back with its exact values.""",
    (380, 300),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for path in write_inputs(out):
        print(path)


if __name__ == "__main__":
    main()
