"""A garment on a photo, the photo to a video in four steps, enlarged and smoothed by ComfyUI."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .i2v_4step_graph import SHARED, both_experts, planned, sampled
from .public_files import (
    ENCODER,
    I2V_HIGH,
    I2V_LOW,
    INTERPOLATION,
    LORA_HIGH,
    LORA_LOW,
    UPSCALER,
    VAE,
    listed,
    public_file,
)
from .tryon_graph import REAL, tryon_photo
from .wan_graph import NEGATIVE

SIZE = {"width": 480, "height": 640, "length": 49}


def tryon_video_4steps() -> dict[str, Node]:
    """Nodes by key. The upscaler multiplies by four and half of that is kept, since a clip of four
    times the size is 3 GB in main memory.
    """
    photo = tryon_photo(REAL)
    del photo["report"]
    photo["tryon_vae"] = photo.pop("vae")
    photo["tryon"].links["vae"] = ("tryon_vae", 0)
    for key, column in (("refine", 1), ("tryon", 2), ("save", 3)):
        photo[key].column = column
    nodes = photo | both_experts(3)
    links = {
        "positive": ("text", 0), "negative": ("text", 1), "vae": ("vae", 0),
        "start_image": ("tryon", 0),
    }  # fmt: skip
    return nodes | {
        "vae": Node("VAELoader", 3, {"vae_name": VAE}, models=public_file(VAE, "vae")),
        "text": Node(
            "FrugalCachedTextEncode",
            4,
            {
                "encoder_name": ENCODER,
                "positive_text": "the person turns slowly and smiles, soft daylight",
                "negative_text": NEGATIVE,
            },
            title="What moves",
            size=(380, 300),
            models=public_file(ENCODER, "text_encoders"),
        ),
        "i2v": Node("WanImageToVideo", 5, SIZE, links, title="Size and length", size=(380, 240)),
        **planned(6, SIZE, "i2v"),
        "sample": sampled(7, "i2v"),
        "frames": Node(
            "FrugalWanDecode", 8, {}, {"samples": ("sample", 0), "vae": ("vae", 0)},
            size=(380, 200),
        ),
        "upscaler": Node(
            "UpscaleModelLoader", 8, {"model_name": UPSCALER},
            models=public_file(UPSCALER, "upscale_models"),
        ),
        "rife": Node(
            "FrameInterpolationModelLoader", 8, {"model_name": INTERPOLATION},
            models=public_file(INTERPOLATION, "frame_interpolation"),
        ),
        "upscaled": Node(
            "ImageUpscaleWithModel", 9, {},
            {"upscale_model": ("upscaler", 0), "image": ("frames", 0)}, title="Four times as large",
        ),
        "scaled": Node(
            "ImageScaleBy", 9, {"upscale_method": "area", "scale_by": 0.5},
            {"image": ("upscaled", 0)}, title="Half of that",
        ),
        "smooth": Node(
            "FrameInterpolate", 9, {"multiplier": 2},
            {"interp_model": ("rife", 0), "images": ("scaled", 0)}, title="Twice the frames",
        ),
        "clip": Node("CreateVideo", 10, {"fps": 32.0}, {"images": ("smooth", 0)}),
        "save_clip": Node(
            "SaveVideo", 10, {"filename_prefix": "frugal/tryon_clip"}, {"video": ("clip", 0)},
            title="The video", size=(480, 620),
        ),
    }  # fmt: skip


GROUPS = [
    Group("1. Photo and garment", 0, 0),
    Group("2. Try-on", 1, 2, "#3f9e6b"),
    Group("3. Video in four steps", 3, 7, "#9e6b3f"),
    Group("4. Larger and smoother (ComfyUI)", 8, 10, "#6b3f9e"),
]
CATVTON = [
    ("checkpoints", REAL["base"]), ("CatVTON", REAL["attention"]), ("vae", REAL["vae"]),
]  # fmt: skip
VIDEO = [
    ("diffusion_models", I2V_HIGH), ("diffusion_models", I2V_LOW), ("loras", LORA_HIGH),
    ("loras", LORA_LOW), *SHARED,
]  # fmt: skip
NOTE = Note(
    f"""## A garment on a photo, then a smooth video of it

Load a photo under *Person*, open it in the **MaskEditor** (right click) and paint over the clothes
to replace. Write what moves, **Run**.

Try-on (`model.safetensors` is in `mix-48k-1024/attention` of CatVTON):

{listed(CATVTON)}

**Licence:** the CatVTON weights are CC BY-NC-SA 4.0, non-commercial. A shop may not use them.

Video:

{listed(VIDEO)}

Larger and smoother, with ComfyUI's own nodes; *Run Frame Interpolation Model* came after ComfyUI
0.3.75. On an older one delete it with its loader, connect *Half of that* to *Create Video* and set
fps to 16.

{listed([("upscale_models", UPSCALER), ("frame_interpolation", INTERPOLATION)])}

Cards and times: the note of `wan2.2_i2v_4steps_12gb`; at 480 x 640 and 49 frames a step is less
than half of that. Nothing was measured on a card.""",
    (480, 900),
)
