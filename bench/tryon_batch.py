"""Twenty try-ons at once: as twenty requests in a server's queue, and as one batch node.

`python bench/tryon_batch.py RESULTS.json TREE [--steps 4] [--persons 4] [--garments 5]` starts a
fresh ComfyUI per way with the demo's small models, sends one request to warm it up, then all
pictures: "queue" posts one graph per picture from as many threads at the same moment, "batch"
posts one graph with *Try-On Batch*, "one by one" the same with groups of one. Both ways give
picture n the seed of the first plus n, so the pictures are compared as well.

Seconds run from the first post to the last picture. Peak memory is the server's resident set,
models and libraries included. It runs on the CPU unless --gpu is given.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import harness

SEED, WARM_SEED, CANVAS, LIMIT = 100, 1, (128, 192), 1800
WAYS = ("queue", "batch", "one by one")


def upload_figures(server, folder: Path, persons: int, garments: int) -> None:
    """Pictures named person_i, mask_i and garment_i into the server's input folder."""
    import numpy as np
    from PIL import Image

    from frugal.demo.data import held_out_swap
    from frugal.demo.figures import render_garment, render_person

    def send(name, pixels):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        server.upload(folder / f"{name}.png")

    for i in range(max(persons, garments)):
        person, own, garment = held_out_swap(i + 1)
        before, mask = render_person(person, own)
        send(f"person_{i}", before)
        send(f"mask_{i}", np.repeat(np.where(mask > 0, 255, 0).astype(np.uint8)[..., None], 3, 2))
        send(f"garment_{i}", render_garment(garment))


def loaders(steps: int) -> dict:
    from frugal.demo.tryon_graph import DEMO

    return {
        "model": ("FrugalLoadCatVTON", {
            "base": DEMO["base"], "attention": DEMO["attention"], "weight_dtype": "auto",
        }),
        "vae": ("VAELoader", {"vae_name": DEMO["vae"]}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler_ancestral"}),
        "sigmas": ("BasicScheduler", {
            "model": ["model", 0], "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0,
        }),
    }  # fmt: skip


def prompt(nodes: dict) -> dict:
    return {key: {"class_type": kind, "inputs": given} for key, (kind, given) in nodes.items()}


def single(person: int, garment: int, seed: int, steps: int) -> dict:
    """One picture through the single nodes."""
    width, height = CANVAS
    return prompt(loaders(steps) | {
        "person": ("LoadImage", {"image": f"person_{person}.png"}),
        "garment": ("LoadImage", {"image": f"garment_{garment}.png"}),
        "mask": ("LoadImageMask", {"image": f"mask_{person}.png", "channel": "red"}),
        "prepare": ("FrugalTryOnPrepare", {
            "person": ["person", 0], "garment": ["garment", 0], "mask": ["mask", 0],
            "width": width, "height": height, "fit": "letterbox", "context": 25,
            "mask_threshold": 0.5,
        }),
        "condition": ("FrugalTryOnConditioning", {
            "person_canvas": ["prepare", 0], "garment_canvas": ["prepare", 1],
            "mask_canvas": ["prepare", 2], "vae": ["vae", 0],
        }),
        "sample": ("SamplerCustom", {
            "model": ["model", 0], "add_noise": True, "noise_seed": seed, "cfg": 2.5,
            "positive": ["condition", 0], "negative": ["condition", 1],
            "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["condition", 2],
        }),
        "stitch": ("FrugalTryOnStitch", {
            "samples": ["sample", 0], "vae": ["vae", 0], "frame": ["prepare", 3], "mask_blur": 0,
        }),
        "save": ("SaveImage", {"images": ["stitch", 0], "filename_prefix": f"queue_{seed}"}),
    })  # fmt: skip


def together(persons: int, garments: int, steps: int, largest: int) -> dict:
    """All pictures through the batch node."""
    width, height = CANVAS
    nodes = loaders(steps)

    def batched(kind, count):
        for i in range(count):
            nodes[f"{kind}_{i}"] = ("LoadImage", {"image": f"{kind}_{i}.png"})
        last = [f"{kind}_0", 0]
        for i in range(1, count):
            nodes[f"{kind}s_{i}"] = ("ImageBatch", {"image1": last, "image2": [f"{kind}_{i}", 0]})
            last = [f"{kind}s_{i}", 0]
        return last

    nodes["mask"] = ("ImageToMask", {"image": batched("mask", persons), "channel": "red"})
    nodes["batch"] = ("FrugalTryOnBatch", {
        "model": ["model", 0], "vae": ["vae", 0], "persons": batched("person", persons),
        "garments": batched("garment", garments), "masks": ["mask", 0],
        "combine": "all combinations", "width": width, "height": height, "fit": "letterbox",
        "steps": steps, "cfg": 2.5, "eta": 1.0, "seed": SEED, "mask_blur": 0,
        "memory_budget": 0.0, "largest_group": largest, "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
    })  # fmt: skip
    nodes["save"] = ("SaveImage", {"images": ["batch", 0], "filename_prefix": "batch"})
    nodes["text"] = ("PreviewAny", {"source": ["batch", 1]})
    return prompt(nodes)


def queue_at_once(server, prompts: list[dict]) -> list:
    """Results in order; every prompt is posted by a thread of its own when all are ready."""
    barrier, results = threading.Barrier(len(prompts)), [None] * len(prompts)

    def send(i):
        barrier.wait()
        try:
            results[i] = server.run(prompts[i], timeout=LIMIT)
        except Exception as error:  # counted as a failure below, with what it said
            results[i] = error

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def measure(way: str, tree: str, args, scratch: Path) -> tuple[dict, list]:
    """(figures, pictures uint8 [H, W, 3] or None per failure) of one way on a fresh server."""
    import numpy as np
    from PIL import Image

    from frugal.demo.comfy_server import ComfyServer
    from frugal.demo.layout import MODELS

    base = scratch / way.replace(" ", "_")
    (base / "figures").mkdir(parents=True)
    shutil.copytree(MODELS, base / "models")
    pairs = [(p, g) for p in range(args.persons) for g in range(args.garments)]
    with ComfyServer(tree, base, cpu=not args.gpu) as server:
        upload_figures(server, base / "figures", args.persons, args.garments)
        server.run(single(0, 0, WARM_SEED, args.steps))
        idle = server.rss_bytes()
        start = time.perf_counter()
        if way == "queue":
            singles = [single(p, g, SEED + i, args.steps) for i, (p, g) in enumerate(pairs)]
            results = queue_at_once(server, singles)
        else:
            largest = 1 if way == "one by one" else 8
            one = together(args.persons, args.garments, args.steps, largest)
            results = queue_at_once(server, [one])
        seconds = time.perf_counter() - start
        made, said = [], []
        for result in results:
            if isinstance(result, Exception) or result.status != "success":
                said.append(str(result) if isinstance(result, Exception) else str(result.errors))
                continue
            for node, file in result.files():
                if node == "save":
                    with Image.open(io.BytesIO(server.view(**file))) as picture:
                        made.append(np.asarray(picture.convert("RGB")))
        text = [o["text"] for r in results if hasattr(r, "outputs") for o in r.outputs.values()
                if "text" in o]  # fmt: skip
        figures = {
            "pictures": len(made),
            "failures": len(pairs) - len(made),
            "said": said,
            "seconds": round(seconds, 2),
            "seconds_per_picture": round(seconds / len(pairs), 3),
            "rss_before_bytes": idle,
            "peak_rss_bytes": server.peak_rss(),
            "node_report": text[-1] if way != "queue" and text else None,
        }
    return figures, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("tree")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--persons", type=int, default=4)
    parser.add_argument("--garments", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    harness.enter("none")
    import numpy as np
    import torch

    gpu = args.gpu and torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} threads",
        "torch": torch.__version__,
        "comfyui": Path(args.tree).name,
        "commit": harness.commit(),
        "canvas": f"{CANVAS[0]} x {CANVAS[1]} px",
        "steps": args.steps,
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "ways": {},
    }
    pictures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            figures, pictures[way] = measure(way, args.tree, args, Path(scratch))
            found["ways"][way] = figures
            print(way, json.dumps(figures), flush=True)
    for way in WAYS[1:]:
        pairs = list(zip(pictures[way], pictures["queue"], strict=False))
        apart = [int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs]
        found["ways"][way]["most_levels_from_queue"] = max(apart, default=None)
    harness.write(args.results, found)
    if any(figures["failures"] for figures in found["ways"].values()):
        sys.exit("some pictures failed; see the results")


if __name__ == "__main__":
    main()
