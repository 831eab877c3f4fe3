"""Pictures for the template cards of those graphs that the demo's own models can run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import batch_graph, mask_graph
from .comfy_server import ComfyServer, ServerError


def write_inputs(folder: Path) -> None:
    """What the graphs below load, into ComfyUI's input folder."""
    mask_graph.write_inputs(folder)
    batch_graph.draw_into(folder)


def pictures_of(server: ComfyServer, name: str, graph: dict[str, Any]) -> list[Image.Image]:
    """Run the graph `name` and choose what its card shows; none for a graph that needs files which
    do not come with the demo.
    """
    if name not in CHOICES:
        return []
    prompt = server.convert(graph)
    result = server.run(prompt)
    if result.status != "success":
        raise ServerError(f"{name} did not run: {result.errors}")
    made: dict[str, list[Image.Image]] = {}
    for node, entry in result.files():
        if entry["type"] == "output":
            picture = Image.open(io.BytesIO(server.view(**entry))).convert("RGB")
            made.setdefault(prompt[node]["inputs"]["filename_prefix"], []).append(picture)
    return CHOICES[name](made)


def _masks(made: dict[str, list[Image.Image]]) -> list[Image.Image]:
    photo, mask = mask_graph.photo()
    [composite] = made["frugal/masks_photo"]
    return [Image.fromarray(photo), Image.fromarray(mask).convert("RGB"), composite]


def _batch(made: dict[str, list[Image.Image]]) -> list[Image.Image]:
    """A row per figure: the figure, then each garment and the figure in it."""
    given = batch_graph.pictures()
    garments = [given[name] for name in batch_graph.GARMENTS]
    results = iter(made["frugal/tryon_batch"])
    rows = []
    for name in batch_graph.FIGURES:
        row = [given[name]]
        for garment in garments:
            row += [garment, np.asarray(next(results))]
        rows.append(np.concatenate(row, axis=1))
    return [Image.fromarray(np.concatenate(rows, axis=0))]


CHOICES = {"masks": _masks, "tryon_batch": _batch}
