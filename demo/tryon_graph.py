"""The try-on graphs: a photo dressed, and dressed and animated.

The demo graph and its real-size twin are one description with two sets of names and sizes, so they
cannot drift apart.
"""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .public_files import ENCODER, I2V_LARGE, VAE, VISION, public_file

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


def _picture(file: str, title: str) -> Node:
    return Node("LoadImage", 0, {"image": file}, title=title, size=(340, 340))


def _models(s: dict, real: bool) -> dict[str, Node]:
    """CatVTON and its VAE; the real ones say where they come from."""
    base, attention, vae = s["base"], s["attention"], s["vae"]
    bases = f"{HUB}/webui/stable-diffusion-inpainting/resolve/main"
    versions = f"{HUB}/zhengchong/CatVTON/resolve/main/mix-48k-1024/attention"
    vaes = f"{HUB}/stabilityai/sd-vae-ft-mse-original/resolve/main"
    catvton = [
        *model(base, f"{bases}/{base}", "checkpoints"),
        *model(attention, f"{versions}/{attention}", "CatVTON"),
    ]
    return {
        "catvton": Node(
            "FrugalLoadCatVTON",
            1,
            {"base": base, "attention": attention},
            size=(380, 300),
            models=catvton if real else [],
        ),
        "vae": Node(
            "VAELoader",
            1,
            {"vae_name": vae},
            size=(380, 70),
            models=model(vae, f"{vaes}/{vae}", "vae") if real else [],
        ),
    }


def tryon_photo(s: dict) -> dict[str, Node]:
    """Photo with a painted mask and garment -> dressed photo, in one node."""
    width, height = s["canvas"]
    return {
        "person": _picture(s["person"], "Person: paint the mask"),
        "garment": _picture(s["garment"], "Garment"),
        **_models(s, True),
        "refine": Node(
            "FrugalMaskRefine", 2, {"fill_holes": -1}, {"mask": ("person", 1)}, size=(380, 660)
        ),
        "tryon": Node(
            "FrugalTryOn",
            3,
            {
                "width": width,
                "height": height,
                "fit": s["fit"],
                "steps": s["steps"],
                "cfg": s["cfg"],
                "seed": 7,
                "mask_blur": s["mask_blur"],
            },
            {
                "model": ("catvton", 0),
                "vae": ("vae", 0),
                "person": ("person", 0),
                "garment": ("garment", 0),
                "mask": ("refine", 0),
                "garment_mask": ("garment", 1),
            },
            size=(380, 420),
        ),
        "save": Node(
            "SaveImage",
            4,
            {"filename_prefix": "frugal/tryon"},
            {"images": ("tryon", 0)},
            title="Dressed photo",
            size=(340, 460),
        ),
        "report": Node(
            "FrugalReport",
            4,
            {},
            {"model": ("catvton", 0), "images": ("tryon", 0)},
            size=(420, 460),
        ),
    }


def tryon_to_video(s: dict, real: bool) -> dict[str, Node]:
    """Photo and garment -> dressed photo -> short clip, with a report at the end."""
    width, height = s["canvas"]
    clip_width, clip_height, frames = s["clip"]
    nodes = {
        "person": _picture(s["person"], "Person"),
        "mask": Node(
            "LoadImageMask",
            0,
            {"image": s["mask"], "channel": "red"},
            title="Mask: what to repaint",
            size=(340, 340),
        ),
        "garment": _picture(s["garment"], "Garment"),
        **_models(s, real),
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
            {
                "person": ("person", 0),
                "garment": ("garment", 0),
                "mask": ("refine", 0),
                "garment_mask": ("garment", 1),
            },
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
            models=public_file(s["wan"], "diffusion_models") if real else [],
        ),
        "shift": Node("ModelSamplingSD3", 4, {"shift": 8.0}, {"model": ("wan", 0)}),
        "wan_vae": Node(
            "VAELoader",
            4,
            {"vae_name": s["wan_vae"]},
            models=public_file(s["wan_vae"], "vae") if real else [],
        ),
    }
    if real:
        nodes |= {
            "clip": Node(
                "CLIPLoader",
                4,
                {"clip_name": ENCODER, "type": "wan"},
                models=public_file(ENCODER, "text_encoders"),
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
                models=public_file(VISION, "clip_vision"),
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

A small try-on model trained for this demo puts the garment on the figure. It was trained on
drawn people only and does not work on photos.

The clip comes from a **tiny Wan with random weights**: it shows that every part of the video chain
runs, not what Wan can paint.

For real photos open `tryon_12gb`.""",
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
    (380, 480),
)
PHOTO_GROUPS = [
    Group("1. Photo and garment", 0, 0),
    Group("2. Model and mask", 1, 2, "#3f9e6b"),
    Group("3. Dressed photo", 3, 4, "#6b3f9e"),
]
PHOTO_NOTE = Note(
    """## A garment on a photo

Load a photo under *Person*, open it in the **MaskEditor** (right click) and paint over the clothes
to replace, with some room around them. Pixels outside the mask stay as they are.

Files and folders:

- `models/checkpoints/sd-v1-5-inpainting.safetensors`
- `models/CatVTON/model.safetensors` (`mix-48k-1024/attention` of the CatVTON weights)
- `models/vae/vae-ft-mse-840000-ema-pruned.safetensors`

**Licence:** the CatVTON weights are CC BY-NC-SA 4.0 (non-commercial).

Estimated at 2.3 GB of memory at 768 x 1024 in fp16; *quantize* in *Load CatVTON* takes less.
Not yet measured on a card.""",
    (380, 400),
)
