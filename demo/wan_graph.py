"""The graphs that make a video with Wan 2.1 in many steps: from text, from a picture."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .public_files import ENCODER, I2V_LARGE, T2V_SMALL, VAE, VISION, public_file

# ComfyUI puts this picture into its input folder.
FIRST_FRAME = "example.png"
NEGATIVE = "blurry, distorted, static, worst quality"
TALL = 420
WIDE = {"width": 832, "height": 480, "length": 81}
UPRIGHT = {"width": 480, "height": 832, "length": 81}


def loaders(model: str) -> dict[str, Node]:
    return {
        "wan": Node(
            "FrugalLoadWan",
            0,
            {"model_name": model},
            size=(380, 220),
            models=public_file(model, "diffusion_models"),
        ),
        "vae": Node("VAELoader", 0, {"vae_name": VAE}, models=public_file(VAE, "vae")),
    }


def text(key: str, column: int, text: str, title: str = "") -> dict[str, Node]:
    """One prompt through the cache: the encoder is loaded for new words only."""
    return {
        key: Node(
            "FrugalCachedTextEncode",
            column,
            {"encoder_name": ENCODER, "positive_text": text, "negative_text": NEGATIVE},
            title=title,
            size=(380, 300),
            models=public_file(ENCODER, "text_encoders"),
        )
    }


def _planned(latent: tuple[str, int], size: dict[str, int]) -> dict[str, Node]:
    """shift -> cached cross-attention -> memory plan -> attention, with the plan's picture. size:
    width, height and length of the clip, as on the node that makes the latent.
    """
    return {
        "shift": Node("ModelSamplingSD3", 2, {"shift": 8.0}, {"model": ("wan", 0)}),
        "context": Node(
            "FrugalWanConstantContext", 2, {}, {"wan_model": ("shift", 0)}, size=(380, 240)
        ),
        "plan": Node(
            "FrugalMemoryPlan",
            2,
            {
                "width": size["width"],
                "height": size["height"],
                "frames": size["length"],
                "budget_gb": 12.0,
            },
            {"model": ("context", 0), "vae": ("vae", 0), "latent": latent},
            size=(380, TALL),
        ),
        "chart": Node(
            "PreviewImage",
            3,
            {},
            {"images": ("plan", 3)},
            title="Memory by phase",
            size=(560, TALL),
        ),
        "attention": Node("FrugalAttention", 3, {}, {"base_model": ("plan", 0)}, size=(380, 280)),
    }


def wan_t2v() -> dict[str, Node]:
    """Text to video with the 1.3B model."""
    settings = {"seed": 7, "steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    return (
        loaders(T2V_SMALL)
        | text(
            "text",
            1,
            "a red fox walks through fresh snow, soft morning light, the camera follows",
            "Your prompt",
        )
        | {"latent": Node("EmptyHunyuanLatentVideo", 1, WIDE, title="Size and length")}
        | _planned(("latent", 0), WIDE)
        | _made(settings, ("text", 0), ("text", 1), ("latent", 0), "frugal/t2v")
    )


def wan_i2v() -> dict[str, Node]:
    """A picture to video with the 14B model on a card of 12 GB."""
    settings = {"seed": 7, "steps": 20, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    return (
        loaders(I2V_LARGE)
        | {
            "vision": Node(
                "CLIPVisionLoader",
                0,
                {"clip_name": VISION},
                models=public_file(VISION, "clip_vision"),
            ),
            "picture": Node(
                "LoadImage", 0, {"image": FIRST_FRAME}, title="First frame", size=(340, 340)
            ),
            "look": Node(
                "CLIPVisionEncode",
                1,
                {"crop": "none"},
                {"clip_vision": ("vision", 0), "image": ("picture", 0)},
            ),
        }
        | text("text", 1, "the person turns slowly and smiles, soft daylight", "What moves")
        | {
            "i2v": Node(
                "WanImageToVideo",
                1,
                UPRIGHT,
                {
                    "positive": ("text", 0),
                    "negative": ("text", 1),
                    "vae": ("vae", 0),
                    "clip_vision_output": ("look", 0),
                    "start_image": ("picture", 0),
                },
            )
        }
        | _planned(("i2v", 2), UPRIGHT)
        | _made(settings, ("i2v", 0), ("i2v", 1), ("i2v", 2), "frugal/i2v")
    )


def _made(settings: dict, positive, negative, latent, prefix: str) -> dict[str, Node]:
    return {
        "sample": Node(
            "FrugalSampler",
            4,
            {"preset": "quality", **settings},
            {
                "model": ("attention", 0),
                "positive": positive,
                "negative": negative,
                "latent_image": latent,
            },
            size=(380, 460),
        ),
        "decode": Node(
            "FrugalWanDecodeToFile",
            5,
            {"filename_prefix": prefix, "fps": 16.0},
            {"samples": ("sample", 0), "vae": ("vae", 0)},
            title="The video",
            size=(480, 620),
        ),
    }


GROUPS = [
    Group("1. Files", 0, 0),
    Group("2. What it shows", 1, 1),
    Group("3. Memory and kernels", 2, 3, "#6b3f9e"),
    Group("4. Sample and decode", 4, 5, "#3f9e6b"),
]
T2V_NOTE = Note(
    f"""## Wan 2.1 1.3B: text to video

- `models/diffusion_models/{T2V_SMALL}`
- `models/text_encoders/{ENCODER}`
- `models/vae/{VAE}`

**Memory Plan** predicts the memory of the run and works in chunks only if your budget needs it: set
**budget_gb** to your card. **Cache Cross-Attention K/V** and **Attention Kernel (Sage, Flash)**
do not change the video.
The sampler's preset decides how much work is skipped: *off* is ComfyUI's own sampler to the bit.

The text encoder is loaded only when the prompt changes.""",
    (400, 420),
)
I2V_NOTE = Note(
    f"""## Wan 2.1 14B: a picture comes alive, on 12 GB

- `models/diffusion_models/{I2V_LARGE}`
- `models/text_encoders/{ENCODER}`
- `models/vae/{VAE}`
- `models/clip_vision/{VISION}`

The fp8 file has 16 GB of weights, so part of it stays in main memory: have 32 GB. To hold more of
it on the card, make a smaller file of the fp16 one with the graph `quantize_wan` or `calibrate_wan`
(int8 keeps most, W4A8 is about half the size) and choose that here.

**Memory Plan** shows the memory of each phase and enables what your budget needs. Its figures are
predictions; on a 12 GB card itself nothing has been measured yet.

The video goes straight into a file; if decoding is interrupted, the latent is kept.""",
    (420, 480),
)
