"""The shipped graphs made small: tiny files under the public names, few frames and steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from frugal.demo import run as demo
from frugal.demo.layout import MODELS, WORKFLOWS
from frugal.demo.public_files import (
    CAUSAL,
    I2V_HIGH,
    I2V_LARGE,
    I2V_LOW,
    INTERPOLATION,
    LORA_21,
    LORA_HIGH,
    LORA_LOW,
    T2V_SMALL,
    UPSCALER,
    VAE,
)
from frugal.demo.tiny_wan import build_demo_wan, save
from frugal.demo.tryon_graph import DEMO, REAL
from frugal.demo.wan_graph import FIRST_FRAME
from frugal.kernels.checkpoints.wan_shapes import WanConfig
from frugal.tests.helpers import wan as bed

WIDTH, HEIGHT, FRAMES = 64, 64, 5
SEED = 7  # in every shipped graph
KINDS = ("positive", "negative")
TEXT = ("FrugalCachedTextEncode", "CLIPTextEncode", "CLIPLoader")
GONE = (*TEXT, "CLIPVisionLoader", "CLIPVisionEncode", "FrugalReport")
SAMPLERS = ("FrugalSampler", "FrugalCausalSampler", "KSampler")
# Wan 2.2's image to video experts have no CLIP branch.
EXPERT = replace(bed.I2V, image=False)
# Of each class, what makes it small; only inputs that the graph has are set.
SMALL = {
    "EmptyHunyuanLatentVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "WanImageToVideo": {"width": WIDTH, "height": HEIGHT, "length": FRAMES},
    "ImageScale": {"width": WIDTH, "height": HEIGHT},
    "FrugalSampler": {"steps": 2},
    "FrugalCausalSampler": {"steps": 2, "frames_per_block": 1},
    "FrugalCausalVideoFile": {"steps": 2, "frames_per_block": 1},
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
    shutil.copyfile(tiny["t2v"], models / "diffusion_models" / CAUSAL)
    write_fp8(models / "diffusion_models" / I2V_LARGE, bed.I2V)
    for seed, (file, lora) in enumerate(((I2V_HIGH, LORA_HIGH), (I2V_LOW, LORA_LOW)), 31):
        write_fp8(models / "diffusion_models" / file, EXPERT, seed)
        write_lora(models / "loras" / lora, EXPERT, seed)
    write_lora(models / "loras" / LORA_21, bed.I2V, 33)
    draw_pictures(server.base / "input")
    return {kind: tiny[kind].name for kind in KINDS}


def write_fp8(path: Path, config: WanConfig, seed: int = 1) -> None:
    """As ComfyUI's `fp8_scaled` files are."""
    marker = torch.zeros(2).to(torch.float8_e4m3fn)
    source = bed.weights(config, seed)
    made = bed.scaled(source, torch.float8_e4m3fn, config=config, marker=marker)
    bed.write(path, *made[:2])


def write_lora(path: Path, config: WanConfig, seed: int, rank: int = 4) -> None:
    """A LoRA of every linear layer of the blocks, named as LightX2V's files are."""
    make, state = torch.Generator().manual_seed(seed), {}
    source = bed.weights(config)
    for layer in bed.block_linears(source, config):
        out, inside = source[f"{layer}.weight"].shape
        for part, rows, columns in (("down", rank, inside), ("up", out, rank)):
            factor = torch.randn(rows, columns, generator=make) / columns**0.5
            state[f"diffusion_model.{layer}.lora_{part}.weight"] = factor
        state[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(rank))
    save(state, path)


def write_enhancers(models: Path) -> None:
    """What ComfyUI's own nodes enlarge and smooth a clip with, for the graph that ends with them.
    Apart from the rest: it needs spandrel, and that needs a torchvision made for this torch.
    """
    write_upscaler(models / "upscale_models" / UPSCALER)
    write_interpolation(models / "frame_interpolation" / INTERPOLATION)


def write_upscaler(path: Path) -> None:
    """A Real-ESRGAN x4 with one block of few channels."""
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(5)
    save(RRDBNet(num_filters=8, num_blocks=1, scale=4).state_dict(), path)


def write_interpolation(path: Path) -> bool:
    """A RIFE of few channels, where this ComfyUI knows the architecture."""
    try:
        from comfy_extras.frame_interpolation_models.ifnet import IFNet
    except ImportError:
        return False
    torch.manual_seed(6)
    save(IFNet(head_ch=4, channels=[16] * 5).state_dict(), path)
    return True


def draw_pictures(folder: Path) -> None:
    from frugal.demo import batch_graph

    person, mask, garment, _ = demo.swap(demo.SHOWN)
    painted = np.dstack([person, np.where(mask > 0, 0, 255).astype(np.uint8)])
    for name, picture in (
        (REAL["person"], painted), (REAL["mask"], mask), (REAL["garment"], garment),
        (DEMO["person"], person), (DEMO["mask"], mask), (DEMO["garment"], garment),
        (FIRST_FRAME, person),
    ):  # fmt: skip
        Image.fromarray(picture).save(folder / name)
    batch_graph.draw_into(folder)


def small(server, name: str, texts: dict[str, str], seed: int = SEED) -> dict:
    """A shipped graph as the API takes it. texts: stored text embeddings, by kind. seed: of its
    first sampler; the others keep their distance to it.
    """
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
        kept = {"steps"} if inputs.get("preset") == "distilled" else set()
        less = SMALL.get(node["class_type"], {})
        inputs |= {k: v for k, v in less.items() if k in inputs and k not in kept}
        inputs.pop("clip_vision_output", None)
        if "seed" in inputs:
            inputs["seed"] += seed - SEED
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
