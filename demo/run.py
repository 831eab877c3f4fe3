"""The demo's job: run the shipped graph in a real ComfyUI and save what it made.

Called by `dev.py demo`. Without pictures it dresses drawn figures with the small committed models
and leaves tryon.png, comparison.png, photo.png, clip.mp4 and report.json in --out. With --person,
--garment and --models it runs the real-size graph on the public weights instead.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data

from .comfy_server import ComfyServer, Result, ServerError
from .data import held_out_swap
from .figures import render_garment, render_person
from .layout import DEMO, LABEL, MODELS, WORKFLOWS
from .real_size import RealSizeError, run_real
from .sheet import psnr, sheet
from .tiny_wan import build_demo_wan

SHOWN, OTHERS = 1, (0, 2, 3, 4)  # held-out swaps: the demo's own, and more rows of the sheet
PHOTO_GROW = 4
INPUTS = ("frugal_demo_person.png", "frugal_demo_mask.png", "frugal_demo_garment.png")
VIDEO_OUTPUTS = ("FrugalWanDecodeToFile", "FrugalReport")


def swap(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Held-out swap: person in their own clothes, mask, the other garment, and the true picture of
    the swap.
    """
    person, own, garment = held_out_swap(number)
    before, mask = render_person(person, own)
    return before, mask, render_garment(garment), render_person(person, garment)[0]


def set_pictures(prompt: dict, names: tuple[str, str, str]) -> dict:
    """The prompt with person, mask and garment files replaced."""
    text = json.dumps(prompt)
    for old, new in zip(INPUTS, names, strict=True):
        text = text.replace(json.dumps(old), json.dumps(new))
    return json.loads(text)


def without(prompt: dict, types: tuple[str, ...]) -> dict:
    return {key: node for key, node in prompt.items() if node["class_type"] not in types}


def progress(prompt: dict):
    """Callback that prints each node as it starts."""
    started = time.perf_counter()

    def show(node: str, value: int, maximum: int) -> None:
        if not maximum and node in prompt:
            print(
                f"  {time.perf_counter() - started:6.1f} s  {prompt[node]['class_type']}",
                flush=True,
            )

    return show


def finished(result: Result) -> Result:
    if result.status != "success":
        raise ServerError("; ".join(result.errors) or f"the graph ended as {result.status}")
    return result


def pictures(server: ComfyServer, result: Result) -> dict[str, bytes]:
    """Saved files of a run by extension."""
    return {
        Path(entry["filename"]).suffix: server.view(**entry)
        for _, entry in result.files()
        if entry["type"] == "output"
    }


def as_array(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def upload(server: ComfyServer, folder: Path, name: str, picture: np.ndarray) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return server.upload(path)


def try_swap(
    server: ComfyServer, prompt: dict, folder: Path, number: int
) -> tuple[dict[str, bytes], dict, str, Result]:
    """Run the graph on one held-out swap: files made, sheet row, its note, the run."""
    before, mask, garment, truth = swap(number)
    names = tuple(
        # The shown swap goes in under the names that the shipped graph has already.
        upload(server, folder, name if number == SHOWN else f"{number}_{name}", p)
        for name, p in zip(INPUTS, (before, mask, garment), strict=True)
    )
    graph = set_pictures(prompt, names)
    result = finished(server.run(graph, progress(graph) if number == SHOWN else None))
    files = pictures(server, result)
    made = as_array(files[".png"])
    masked = np.where(mask[..., None] > 0, 127, before).astype(np.uint8)
    row = {
        "person": before,
        "masked": masked,
        "garment": garment,
        "result": made,
        "truth (drawn)": truth,
    }
    same = bool(np.array_equal(made[mask == 0], before[mask == 0]))
    outside = "identical" if same else "CHANGED"
    note = f"masked PSNR {psnr(made, truth, mask):.2f} dB; outside the mask {outside}"
    return files, row, note, result


def try_photo(server: ComfyServer, prompt: dict, folder: Path) -> tuple[np.ndarray, str]:
    """Mask chain, crop window and stitch on a real photo: photo, mask and result; what changed."""
    photo, mask = data.astronaut(), np.asarray(Image.open(DEMO / "photo" / "cloth_mask.png"))
    garment = swap(SHOWN)[2]
    names = (
        upload(server, folder, "photo.png", photo),
        upload(server, folder, "photo_mask.png", mask),
        upload(server, folder, "photo_garment.png", garment),
    )
    graph = set_pictures(prompt, names)
    for node in graph.values():
        if node["class_type"] == "FrugalTryOnPrepare":
            node["inputs"]["fit"] = "crop around mask"
        if node["class_type"] == "FrugalMaskRefine":
            node["inputs"] |= {"fill_holes": -1, "drop_islands": 200, "grow": PHOTO_GROW}
    made = as_array(pictures(server, finished(server.run(graph)))[".png"])
    changed = (made != photo).any(-1)
    filled = ndimage.binary_fill_holes(mask > 127)
    allowed = ndimage.distance_transform_edt(~filled) <= PHOTO_GROW
    stray = int((changed & ~allowed).sum())
    note = f"{100 * changed.mean():.1f} % of the pixels repainted, {stray} outside the grown mask"
    return np.concatenate([photo, np.repeat(mask[..., None], 3, 2), made], 1), note


def repeat(server: ComfyServer, prompt: dict, times: int) -> dict:
    """Queue the graph `times` times with two alternating seeds (an unchanged prompt would be
    answered from the cache).
    """
    seen: dict[int, set[str]] = {7: set(), 8: set()}
    memory = []
    for number in range(times):
        seed = 7 + number % 2
        for node in prompt.values():
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] = seed
        files = pictures(server, finished(server.run(prompt)))
        pixels = b"".join(
            as_array(data).tobytes() for suffix, data in sorted(files.items()) if suffix == ".png"
        )
        seen[seed].add(hashlib.sha256(pixels).hexdigest())
        memory.append(server.rss_bytes())
        print(f"  run {number + 1}/{times}: server memory {memory[-1] / 1e6:.0f} MB", flush=True)
    return {
        "runs": times,
        "distinct_results_per_seed": [len(s) for s in seen.values()],
        "server_rss_bytes": memory,
    }


def run_demo(tree: Path, out: Path, times: int) -> None:
    base = out / "comfyui"
    build_demo_wan(base / "models")
    begin = time.perf_counter()
    with ComfyServer(tree, base, models=(MODELS,)) as server:
        booted = time.perf_counter() - begin
        print(f"ComfyUI is up after {booted:.1f} s; running workflows/tryon_demo.json", flush=True)
        prompt = server.convert(
            json.loads((WORKFLOWS / "tryon_demo.json").read_text(encoding="utf-8"))
        )
        scratch = out / "inputs"
        files, row, note, result = try_swap(server, prompt, scratch, SHOWN)
        made = as_array(files[".png"])
        (out / "tryon.png").write_bytes(files[".png"])
        clip = next(suffix for suffix in files if suffix != ".png")
        (out / f"clip{clip}").write_bytes(files[clip])
        still = without(prompt, VIDEO_OUTPUTS)
        rows, notes, seconds = [row], [note], []
        for number in OTHERS:
            _, row, note, later = try_swap(server, still, scratch, number)
            rows.append(row)
            notes.append(note)
            seconds.append(round(later.seconds, 2))
        sheet(rows, f"CatVTON architecture, small model of our own: {LABEL}", notes).save(
            out / "comparison.png"
        )
        photo, photo_note = try_photo(server, still, scratch)
        Image.fromarray(photo).save(out / "photo.png")
        before, mask, _, truth = swap(SHOWN)
        shown = next(o["frugal_report"][0] for o in result.outputs.values() if "frugal_report" in o)
        report = {
            "label": LABEL,
            "clip": "tiny Wan I2V with random weights: proves the chain, not picture quality",
            "comfyui": tree.name,
            "boot_seconds": round(booted, 2),
            "first_run_seconds": round(result.seconds, 2),
            "later_tryon_seconds": seconds,
            "masked_psnr_db": round(psnr(made, truth, mask), 2),
            "outside_mask_identical": bool(np.array_equal(made[mask == 0], before[mask == 0])),
            "photo": photo_note,
            "server_peak_rss_bytes": server.peak_rss(),
            "node_report": json.loads(shown),
        }
        if times > 1:
            report["repeat"] = repeat(server, prompt, times)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"masked PSNR {report['masked_psnr_db']} dB, "
        f"peak memory {report['server_peak_rss_bytes'] / 1e6:.0f} MB, "
        f"{time.perf_counter() - begin:.0f} s in all"
    )
    for name in ("tryon.png", "comparison.png", "photo.png", f"clip{clip}", "report.json"):
        print(f"  {out / name}")
    print(f"Note: {LABEL}; the clip is a tiny Wan with random weights.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--person", type=Path)
    parser.add_argument("--garment", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.models:
            run_real(args.tree, args.out, args.person, args.garment, args.mask, args.models)
        else:
            run_demo(args.tree, args.out, args.repeat)
    except (ServerError, RealSizeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
