"""The demo's batch graph: two drawn figures, two garments, four pictures from one node.

`python -m demo.batch_graph FOLDER` draws the pictures that the graph names into ComfyUI's input
folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .data import held_out_swap
from .figures import render_garment, render_person
from .graph_builder import Group, Node, Note

FIGURES = tuple(f"frugal_demo_person_{i}.png" for i in (1, 2))
MASKS = tuple(f"frugal_demo_mask_{i}.png" for i in (1, 2))
GARMENTS = tuple(f"frugal_demo_garment_{i}.png" for i in (1, 2))
NOTE = Note(
    """## Two persons, two garments, four images

*Try-On Batch* encodes each image once, samples as many at a time as fit into memory, and halves
the batch when memory runs out. Its report says what it did.

The models are the small ones of the demo: drawn figures, not photos. `python -m demo.batch_graph
FOLDER` draws the images into ComfyUI's input folder.

*Batch Images* crops the second image to the size of the first. For images of several sizes use
*Load Pictures from Folder*, which gives each at its own size.

For photos load the real weights as in `tryon_12gb`, remove *sampler* and *sigmas* to get
CatVTON's own, and set 768 x 1024, 50 steps, cfg 2.5.""",
)
GROUPS = [
    Group("Pictures", 0, 1),
    Group("Model and sampler", 2, 2, "#a1309b"),
    Group("Batch", 3, 4, "#3f789e"),
]


def pictures() -> dict[str, np.ndarray]:
    """The six pictures by file name, uint8 [192, 128, 3]; masks are white where to repaint."""
    found = {}
    for i, files in enumerate(zip(FIGURES, MASKS, GARMENTS, strict=True)):
        person, own, garment = held_out_swap(i + 1)
        before, mask = render_person(person, own)
        white = np.repeat(np.where(mask > 0, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
        found |= dict(zip(files, (before, white, render_garment(garment)), strict=True))
    return found


def draw_into(folder: Path) -> list[Path]:
    """Write `pictures` as PNG; returns their paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures().items():
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in pictures()]


def tryon_batch(s: dict) -> dict[str, Node]:
    """Nodes by key; `s` holds names, sizes and steps of the demo, see tryon_graph.DEMO."""
    nodes = {}
    for kind, files in (("person", FIGURES), ("mask", MASKS), ("garment", GARMENTS)):
        for i, file in enumerate(files):
            nodes[f"{kind}{i}"] = Node(
                "LoadImage", 0, {"image": file}, title=f"{kind} {i + 1}".title(), size=(260, 320)
            )
        nodes[f"{kind}s"] = Node(
            "ImageBatch", 1, {}, {"image1": (f"{kind}0", 0), "image2": (f"{kind}1", 0)}
        )
    nodes["mask"] = Node("ImageToMask", 1, {"channel": "red"}, {"image": ("masks", 0)})
    nodes["catvton"] = Node(
        "FrugalLoadCatVTON", 2, {"base": s["base"], "attention": s["attention"]}, size=(380, 300)
    )
    nodes["vae"] = Node("VAELoader", 2, {"vae_name": s["vae"]}, size=(380, 70))
    nodes["sampler"] = Node("KSamplerSelect", 2, {"sampler_name": s["sampler"]})
    nodes["sigmas"] = Node(
        "BasicScheduler",
        2,
        {"scheduler": "ddim_uniform", "steps": s["steps"], "denoise": 1.0},
        {"model": ("catvton", 0)},
    )
    nodes["batch"] = Node(
        "FrugalTryOnBatch",
        3,
        {
            "width": s["canvas"][0],
            "height": s["canvas"][1],
            "fit": s["fit"],
            "cfg": s["cfg"],
            "seed": 7,
            "mask_blur": s["mask_blur"],
        },
        {
            "model": ("catvton", 0),
            "vae": ("vae", 0),
            "persons": ("persons", 0),
            "garments": ("garments", 0),
            "masks": ("mask", 0),
            "sampler": ("sampler", 0),
            "sigmas": ("sigmas", 0),
        },
        size=(380, 620),
    )
    nodes["save"] = Node(
        "SaveImage",
        3,
        {"filename_prefix": "frugal/tryon_batch"},
        {"images": ("batch", 0)},
        title="Dressed figures",
        size=(380, 460),
    )
    nodes["text"] = Node("PreviewAny", 4, {}, {"source": ("batch", 1)}, size=(420, 200))
    return nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in draw_into(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
