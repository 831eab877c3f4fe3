"""Write the saved graphs in workflows/ against a real ComfyUI: `python -m demo.build_workflows
--tree DIR`.

The demo graph and its real-size twin are one description with two sets of names and sizes, so they
cannot drift apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .batch_graph import GROUPS as BATCH_GROUPS
from .batch_graph import NOTE as BATCH_NOTE
from .batch_graph import tryon_batch
from .card_pictures import pictures_of, write_inputs
from .comfy_server import ComfyServer
from .graph_builder import Group, Node, Note, build
from .graph_picture import card
from .layout import MODELS, WORKFLOWS
from .mask_graph import GROUPS as MASK_GROUPS
from .mask_graph import NOTE as MASK_NOTE
from .mask_graph import masks_graph
from .public_files import ENCODER, I2V_LARGE, VAE, VISION, wan_file
from .quantize_graph import (
    CALIBRATE_GROUPS,
    CALIBRATE_NOTE,
    QUANTIZE_GROUPS,
    QUANTIZE_NOTE,
    calibrate_wan,
    quantize_wan,
)
from .remote_graph import REMOTE_GROUPS, REMOTE_NOTE, remote_video
from .tiny_wan import build_demo_wan
from .wan_graph import (
    CAUSAL_GROUPS,
    CAUSAL_NOTE,
    I2V_NOTE,
    T2V_NOTE,
    causal_video,
    wan_i2v,
    wan_t2v,
)
from .wan_graph import GROUPS as WAN_GROUPS

HUB = "https://huggingface.co"

DEMO = {
    "person": "frugal_demo_person.png",
    "mask": "frugal_demo_mask.png",
    "garment": "frugal_demo_garment.png",
    "base": "frugal_demo_tryon_base.safetensors",
    "attention": "frugal_demo_tryon_attention.safetensors",
    "vae": "frugal_demo_codec.safetensors",
    "wan": "wan_tiny_random_i2v.safetensors",
    "wan_vae": "wan_tiny_random_vae.safetensors",
    "canvas": (128, 192),
    "fit": "letterbox",
    "mask_feather": 0,
    # deterministic: ancestral samplers draw other noise in each ComfyUI version
    "sampler": "ddim",
    "steps": 20,
    "cfg": 1.0,
    "mask_blur": 0,
    "clip": (128, 192, 17),
    "clip_steps": 4,
    "clip_cfg": 1.0,
}
REAL = {
    "person": "person.png",
    "mask": "person_mask.png",
    "garment": "garment.png",
    "base": "sd-v1-5-inpainting.safetensors",
    "attention": "model.safetensors",
    "vae": "vae-ft-mse-840000-ema-pruned.safetensors",
    "wan": I2V_LARGE,
    "wan_vae": VAE,
    "canvas": (768, 1024),
    "fit": "crop around mask",
    "mask_feather": 0,
    "sampler": "euler_ancestral",
    "steps": 50,
    "cfg": 2.5,
    "mask_blur": 9,
    "clip": (480, 640, 49),
    "clip_steps": 20,
    "clip_cfg": 6.0,
}


def model(name: str, url: str, directory: str) -> list[dict[str, str]]:
    return [{"name": name, "url": url, "directory": directory}]


def tryon_to_video(s: dict, real: bool) -> dict[str, Node]:
    """Photo and garment -> dressed photo -> short clip, with a report at the end."""
    width, height = s["canvas"]
    clip_width, clip_height, frames = s["clip"]
    nodes = {
        "person": Node("LoadImage", 0, {"image": s["person"]}, title="Person", size=(340, 340)),
        "mask": Node(
            "LoadImageMask",
            0,
            {"image": s["mask"], "channel": "red"},
            title="Mask: what to repaint",
            size=(340, 340),
        ),
        "garment": Node("LoadImage", 0, {"image": s["garment"]}, title="Garment", size=(340, 340)),
        "catvton": Node(
            "FrugalLoadCatVTON",
            1,
            {"base": s["base"], "attention": s["attention"]},
            size=(380, 300),
            models=[
                *model(
                    s["base"],
                    f"{HUB}/webui/stable-diffusion-inpainting/resolve/main/{s['base']}",
                    "checkpoints",
                ),
                *model(
                    s["attention"],
                    f"{HUB}/zhengchong/CatVTON/resolve/main/mix-48k-1024/attention/{s['attention']}",
                    "CatVTON",
                ),
            ]
            if real
            else [],
        ),
        "vae": Node(
            "VAELoader",
            1,
            {"vae_name": s["vae"]},
            size=(380, 70),
            models=model(
                s["vae"], f"{HUB}/stabilityai/sd-vae-ft-mse-original/resolve/main/{s['vae']}", "vae"
            )
            if real
            else [],
        ),
        "refine": Node(
            "FrugalMaskRefine",
            1,
            {"feather": s["mask_feather"]},
            {"mask": ("mask", 0)},
            size=(380, 660),
        ),
        "prepare": Node(
            "FrugalTryOnPrepare",
            2,
            {"width": width, "height": height, "fit": s["fit"]},
            {"person": ("person", 0), "garment": ("garment", 0), "mask": ("refine", 0)},
        ),
        "cond": Node(
            "FrugalTryOnConditioning",
            2,
            {},
            {
                "person_canvas": ("prepare", 0),
                "garment_canvas": ("prepare", 1),
                "mask_canvas": ("prepare", 2),
                "vae": ("vae", 0),
            },
        ),
        "sample": Node(
            "KSampler",
            3,
            {
                "seed": 7,
                "steps": s["steps"],
                "cfg": s["cfg"],
                "sampler_name": s["sampler"],
                "scheduler": "ddim_uniform",
            },
            {
                "model": ("catvton", 0),
                "positive": ("cond", 0),
                "negative": ("cond", 1),
                "latent_image": ("cond", 2),
            },
        ),
        "stitch": Node(
            "FrugalTryOnStitch",
            3,
            {"mask_blur": s["mask_blur"]},
            {"samples": ("sample", 0), "vae": ("vae", 0), "frame": ("prepare", 3)},
        ),
        "save": Node(
            "SaveImage",
            3,
            {"filename_prefix": "frugal/tryon"},
            {"images": ("stitch", 0)},
            title="Dressed photo",
            size=(340, 460),
        ),
        "wan": Node(
            "FrugalLoadWan",
            4,
            {"model_name": s["wan"]},
            size=(380, 220),
            models=wan_file(s["wan"], "diffusion_models") if real else [],
        ),
        "shift": Node("ModelSamplingSD3", 4, {"shift": 8.0}, {"model": ("wan", 0)}),
        "wan_vae": Node(
            "VAELoader",
            4,
            {"vae_name": s["wan_vae"]},
            models=wan_file(s["wan_vae"], "vae") if real else [],
        ),
    }
    if real:
        nodes |= {
            "clip": Node(
                "CLIPLoader",
                4,
                {"clip_name": ENCODER, "type": "wan"},
                models=wan_file(ENCODER, "text_encoders"),
            ),
            "positive": Node(
                "CLIPTextEncode",
                4,
                {"text": "the person turns slowly and smiles, soft daylight"},
                {"clip": ("clip", 0)},
                size=(380, 110),
            ),
            "negative": Node(
                "CLIPTextEncode",
                4,
                {"text": "blurry, distorted, static, worst quality"},
                {"clip": ("clip", 0)},
                size=(380, 110),
            ),
            "vision": Node(
                "CLIPVisionLoader",
                4,
                {"clip_name": VISION},
                models=wan_file(VISION, "clip_vision"),
            ),
            "look": Node(
                "CLIPVisionEncode",
                4,
                {"crop": "none"},
                {"clip_vision": ("vision", 0), "image": ("stitch", 0)},
            ),
        }
    else:
        nodes |= {
            "positive": Node(
                "FrugalLoadTextEmbeds", 4, {"embeds_name": "tiny_positive.safetensors"}
            ),
            "negative": Node(
                "FrugalLoadTextEmbeds", 4, {"embeds_name": "tiny_negative.safetensors"}
            ),
        }
    links = {
        "positive": ("positive", 0),
        "negative": ("negative", 0),
        "vae": ("wan_vae", 0),
        "start_image": ("stitch", 0),
    }
    if real:
        links["clip_vision_output"] = ("look", 0)
    return nodes | {
        "i2v": Node(
            "WanImageToVideo",
            5,
            {"width": clip_width, "height": clip_height, "length": frames},
            links,
        ),
        "sample_clip": Node(
            "KSampler",
            5,
            {
                "seed": 7,
                "steps": s["clip_steps"],
                "cfg": s["clip_cfg"],
                "sampler_name": "uni_pc",
                "scheduler": "simple",
            },
            {
                "model": ("shift", 0),
                "positive": ("i2v", 0),
                "negative": ("i2v", 1),
                "latent_image": ("i2v", 2),
            },
        ),
        "save_clip": Node(
            "FrugalWanDecodeToFile",
            6,
            {"filename_prefix": "frugal/clip", "fps": 16.0},
            {"samples": ("sample_clip", 0), "vae": ("wan_vae", 0)},
            title="Clip",
            size=(380, 700),
        ),
        "frames": Node(
            "GetVideoComponents", 7, {}, {"video": ("save_clip", 0)}, title="Frames, to count them"
        ),
        "report": Node(
            "FrugalReport",
            7,
            {},
            {"model": ("catvton", 0), "model_2": ("wan", 0), "images": ("frames", 0)},
            size=(420, 460),
        ),
    }


GROUPS = [
    Group("1. Photo, garment, mask", 0, 0),
    Group("2. Try-on", 1, 3, "#3f9e6b"),
    Group("3. Video", 4, 6, "#9e6b3f"),
    Group("4. Report", 7, 7, "#6b3f9e"),
]
DEMO_NOTE = Note(
    """## Demo: drawn figures, not photos

A small try-on model of our own puts the garment on the figure. It was trained on drawn people only
and knows nothing of photos.

The clip comes from a **tiny Wan with random weights**: it shows that every part of the video chain
runs, not what Wan can paint.

For real photos open `tryon_to_video_12gb`.""",
    7,
)
REAL_NOTE = Note(
    """## Dress a photo, then animate it

Paint the mask over the clothes to replace (white = repaint). Files and folders:

- `models/checkpoints/sd-v1-5-inpainting.safetensors`
- `models/CatVTON/model.safetensors` (`mix-48k-1024/attention` of the CatVTON weights)
- `models/vae/vae-ft-mse-840000-ema-pruned.safetensors`
- `models/diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled.safetensors`
- `models/vae/wan_2.1_vae.safetensors`
- `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`
- `models/clip_vision/clip_vision_h.safetensors`

**Licence:** the CatVTON weights are CC BY-NC-SA 4.0 (non-commercial).

On a 12 GB card ComfyUI keeps part of the 14B model in RAM (16 GB of weights in fp8): have 32 GB.
The sizes here are a starting point that we could not yet measure on such a card.""",
    7,
    (380, 480),
)


def described() -> list[tuple[str, dict[str, Node], Note, list[Group]]]:
    """Every shipped graph: file name, nodes, note, groups."""
    return [
        ("tryon_demo", tryon_to_video(DEMO, False), DEMO_NOTE, GROUPS),
        ("tryon_to_video_12gb", tryon_to_video(REAL, True), REAL_NOTE, GROUPS),
        ("tryon_batch", tryon_batch(DEMO), BATCH_NOTE, BATCH_GROUPS),
        ("masks", masks_graph(), MASK_NOTE, MASK_GROUPS),
        ("quantize_wan", quantize_wan(), QUANTIZE_NOTE, QUANTIZE_GROUPS),
        ("calibrate_wan", calibrate_wan(), CALIBRATE_NOTE, CALIBRATE_GROUPS),
        ("wan_t2v_1.3b", wan_t2v(), T2V_NOTE, WAN_GROUPS),
        ("wan_i2v_14b_12gb", wan_i2v(), I2V_NOTE, WAN_GROUPS),
        ("causal_video", causal_video(), CAUSAL_NOTE, CAUSAL_GROUPS),
        ("remote_video", remote_video(), REMOTE_NOTE, REMOTE_GROUPS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        build_demo_wan(Path(base) / "models")
        (Path(base) / "input").mkdir(exist_ok=True)
        write_inputs(Path(base) / "input")
        with ComfyServer(args.tree, base, models=(MODELS,)) as server:
            for name, nodes, note, groups in described():
                graph = build(server.object_info(), nodes, [note], groups)
                path = WORKFLOWS / f"{name}.json"
                path.write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
                if name != "tryon_demo":  # its card is a picture of its own result
                    pictures = pictures_of(server, name, graph)
                    card(graph, pictures).save(path.with_suffix(".jpg"), quality=88)
                print(path.name, len(graph["nodes"]), "nodes")


if __name__ == "__main__":
    main()
