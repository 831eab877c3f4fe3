"""The shipped graphs made small: tiny files under the public names, few frames and steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from frugal.demo import run as demo
from frugal.demo.layout import MODELS, WORKFLOWS
from frugal.demo.public_files import I2V_LARGE, T2V_SMALL, VAE
from frugal.demo.tiny_wan import build_demo_wan
from frugal.demo.tryon_graph import DEMO, REAL
from frugal.tests.helpers import wan as bed

WIDTH, HEIGHT, FRAMES = 64, 64, 5
KINDS = ("positive", "negative")
TEXT = ("FrugalCachedTextEncode", "CLIPTextEncode", "CLIPLoader")
GONE = (*TEXT, "CLIPVisionLoader", "CLIPVisionEncode", "FrugalReport")
SAMPLERS = ("FrugalSampler", "FrugalCausalSampler", "KSampler")
# Of each class, what makes it small; only inputs that the graph has are set.
SMALL = {
    "EmptyHunyuanLatentVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "WanImageToVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "FrugalSampler": {"steps": 2},
    "FrugalCausalSampler": {"steps": 2, "frames_per_block": 1},
    "KSampler": {"steps": 2},
    "BasicScheduler": {"steps": 2},
    "FrugalTryOn": {"width": 64, "height": 96, "steps": 2, "sampler_name": "euler"},
    "FrugalTryOnPrepare": {"width": 64, "height": 96},
    # Ancestral ones draw noise on the device, and ComfyUI seeds that otherwise on a CPU.
    "KSamplerSelect": {"sampler_name": "euler"},
    "FrugalCalibrate": {"memory_gb": 0.02},
}


def write_files(server) -> dict[str, str]:
    """Every file and picture that the graphs name; {stored text: file name}."""
    models = server.models
    tiny = build_demo_wan(models)
    shutil.copytree(MODELS, models, dirs_exist_ok=True)
    public = {
        tiny["t2v"]: models / "diffusion_models" / T2V_SMALL,
        tiny["vae"]: models / "vae" / VAE,
        MODELS / "diffusion_models" / DEMO["base"]: models / "checkpoints" / REAL["base"],
        MODELS / "CatVTON" / DEMO["attention"]: models / "CatVTON" / REAL["attention"],
        MODELS / "vae" / DEMO["vae"]: models / "vae" / REAL["vae"],
    }
    for source, target in public.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    made = bed.scaled(
        bed.weights(bed.I2V), torch.float8_e4m3fn, config=bed.I2V,
        marker=torch.zeros(2).to(torch.float8_e4m3fn),
    )  # fmt: skip
    bed.write(models / "diffusion_models" / I2V_LARGE, *made[:2])
    draw_pictures(server.base / "input")
    return {kind: tiny[kind].name for kind in KINDS}


def draw_pictures(folder: Path) -> None:
    from frugal.demo import batch_graph

    person, mask, garment, _ = demo.swap(demo.SHOWN)
    painted = np.dstack([person, np.where(mask > 0, 0, 255).astype(np.uint8)])
    for name, picture in (
        (REAL["person"], painted), (REAL["mask"], mask), (REAL["garment"], garment),
        (DEMO["person"], person), (DEMO["mask"], mask), (DEMO["garment"], garment),
    ):  # fmt: skip
        Image.fromarray(picture).save(folder / name)
    batch_graph.draw_into(folder)


def small(server, name: str, texts: dict[str, str], seed: int = 7) -> dict:
    """A shipped graph as the API takes it. texts: stored text embeddings, by kind."""
    prompt = server.convert(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    stored = {}
    for key, node in prompt.items():
        if node["class_type"] == "FrugalCachedTextEncode":
            stored |= {(key, slot): f"stored_{kind}" for slot, kind in enumerate(KINDS)}
        elif node["class_type"] == "CLIPTextEncode":
            stored[key, 0] = f"stored_{KINDS[len(stored) % 2]}"
    for node in prompt.values():
        inputs = node["inputs"]
        for at, link in list(inputs.items()):
            if isinstance(link, list) and (link[0], link[1]) in stored:
                inputs[at] = [stored[link[0], link[1]], 0]
        inputs |= {k: v for k, v in SMALL.get(node["class_type"], {}).items() if k in inputs}
        inputs.pop("clip_vision_output", None)
        if "seed" in inputs:
            inputs["seed"] = seed
    for kind in KINDS if stored else ():
        embeds = {"embeds_name": texts[kind]}
        prompt[f"stored_{kind}"] = {"class_type": "FrugalLoadTextEmbeds", "inputs": embeds}
    return {key: node for key, node in prompt.items() if node["class_type"] not in GONE}


def frames(path: Path) -> np.ndarray:
    """uint8 RGB [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def probed(prompt: dict) -> dict:
    """The graph with latents and decoded pictures kept beside its video files. A codec makes
    another file of pictures that hardly differ, most of all of the noise that random weights paint.
    """
    more = {}
    for key, node in prompt.items():
        inputs = node["inputs"]
        if node["class_type"] in SAMPLERS:
            more[f"9{key}"] = _node("SaveLatent", samples=[key, 0], filename_prefix=key)
        if node["class_type"] == "FrugalWanDecodeToFile":
            sides = {name: inputs[name] for name in ("samples", "vae")}
            more[f"8{key}"] = _node("VAEDecode", **sides)
            more[f"7{key}"] = _node("SaveImage", images=[f"8{key}", 0], filename_prefix=key)
    return {**prompt, **more}


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def made(server, result) -> list[np.ndarray]:
    """What a run left in the output folder, in the order of its nodes: latents in floats, pictures
    [height, width, channels] and clips [frames, height, width, 3] in bytes.
    """
    found = []
    for _, entry in sorted(result.files(), key=lambda pair: int(pair[0])):
        if entry["type"] != "output":
            continue
        path = server.output / entry["subfolder"] / entry["filename"]
        if path.suffix == ".latent":
            found.append(load_file(path)["latent_tensor"].numpy())
        elif path.suffix == ".mp4":
            found.append(frames(path))
        else:
            found.append(np.asarray(Image.open(path)))
    return found
