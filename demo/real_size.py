"""The real-size graph on a person's own photo, with the public weights in their models folder.

Before anything starts, every file the graph names is looked for; what is missing is listed with its
folder and address.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .comfy_server import ComfyServer, ServerError
from .layout import WORKFLOWS

GRAPH = WORKFLOWS / "tryon_to_video_12gb.json"


class RealSizeError(RuntimeError):
    """Something the person must supply is missing; the message says what, where and from where."""


def needed(graph: dict) -> dict[str, str]:
    """Download address of every model file that the saved graph names, by its path below models/:
    a loader's entry has the name that its widget has.
    """
    return {
        f"{entry['directory']}/{entry['name']}": entry["url"]
        for node in graph["nodes"]
        for entry in node["properties"].get("models", ())
    }


def missing(graph: dict, models: Path) -> list[str]:
    """One line per absent file: where it goes and where it comes from."""
    return [
        f"  models/{path}\n      from {url}"
        for path, url in needed(graph).items()
        if not (models / path).exists()
    ]


def upright(path: Path) -> Image.Image:
    """The picture as a person sees it: turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(Image.open(path))


def mask_of(person: Path, mask: Path | None) -> Image.Image:
    """White = repaint: the mask file, else the transparent part of the person's picture."""
    if mask is not None:
        return upright(mask).convert("L")
    picture = upright(person)
    if "A" in picture.getbands():
        alpha = np.asarray(picture.getchannel("A"))
        if (alpha < 128).any():
            return Image.fromarray(np.where(alpha < 128, 255, 0).astype(np.uint8))
    raise RealSizeError(
        "paint a mask in any editor, or in ComfyUI's mask editor, and run again: "
        f"{person.name} has no mask; expected --mask FILE (white over the clothes to replace) or a "
        "picture whose clothes are erased to transparent."
    )


def run_real(
    tree: Path, out: Path, person: Path, garment: Path, mask: Path | None, models: Path
) -> None:
    """Run the 12 GB graph; writes what its save nodes made into `out`. Raises RealSizeError before
    any start.
    """
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    absent = missing(graph, models)
    if absent:
        raise RealSizeError(
            f"{len(absent)} model files are missing in {models}; put them there and run again:\n"
            + "\n".join(absent)
            + "\nThe CatVTON weights are CC BY-NC-SA 4.0 (non-commercial)."
        )
    hole = mask_of(person, mask)
    inputs = out / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    named = {
        "person.png": upright(person).convert("RGB"),
        "person_mask.png": hole.convert("RGB"),
        "garment.png": upright(garment),
    }
    for name, picture in named.items():
        picture.save(inputs / name)
    import torch

    with ComfyServer(
        tree, out / "comfyui", models=(models,), cpu=not torch.cuda.is_available()
    ) as server:
        for name in named:
            server.upload(inputs / name)
        prompt = server.convert(graph)
        result = server.run(
            prompt,
            lambda node, value, top: print(
                f"  {prompt[node]['class_type'] if node in prompt else node} {value}/{top}",
                flush=True,
            ),
            timeout=6 * 3600,
        )
        if result.status != "success":
            raise ServerError("; ".join(result.errors) or f"the graph ended as {result.status}")
        for _, entry in result.files():
            if entry["type"] == "output":
                (out / entry["filename"]).write_bytes(server.view(**entry))
                print(f"  {out / entry['filename']}")
