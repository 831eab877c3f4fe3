"""A picture to video with Wan 14B in four steps: Wan 2.2's two experts, and Wan 2.1."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .public_files import (
    ENCODER,
    I2V_HIGH,
    I2V_LARGE,
    I2V_LOW,
    LORA_21,
    LORA_HIGH,
    LORA_LOW,
    VAE,
    VISION,
    listed,
    public_file,
)
from .wan_graph import FIRST_FRAME, NEGATIVE, UPRIGHT

BUDGET_GB = 11.0
PROMPT = "the person turns slowly and smiles, soft daylight, the camera stays still"
# What the distillation LoRAs were trained at: 1000, 937.5, 833.3, 625 of 1000 with shift 5.
SHIFT, STEPS = 5.0, 4
BOUNDARY = 0.9
GROUPS = [
    Group("1. Model files and picture", 0, 0),
    Group("2. 4-step LoRA and prompt", 1, 1),
    Group("3. Size and length", 2, 2, "#9e6b3f"),
    Group("4. Does it fit?", 3, 3, "#6b3f9e"),
    Group("5. Sample and decode", 4, 5, "#3f9e6b"),
]
EXPERTS = {"high": (I2V_HIGH, LORA_HIGH), "low": (I2V_LOW, LORA_LOW)}


def load_wan(name: str, column: int = 0, title: str = "") -> Node:
    files = public_file(name, "diffusion_models")
    return Node(
        "FrugalLoadWan", column, {"model_name": name}, title=title, size=(380, 200), models=files
    )


def unmerged_lora(name: str, column: int, model: str, title: str) -> Node:
    files = public_file(name, "loras")
    return Node(
        "FrugalLoraSide", column, {"lora_name": name}, {"model": (model, 0)}, title=title,
        size=(380, 130), models=files,
    )  # fmt: skip


def both_experts(column: int) -> dict[str, Node]:
    """Wan 2.2's two files, each with its LoRA, as one model, in three columns from `column` on."""
    nodes = {
        kind: load_wan(file, column, f"Wan 2.2, {kind} noise")
        for kind, (file, _) in EXPERTS.items()
    }
    nodes |= {
        f"{kind}_lora": unmerged_lora(lora, column + 1, kind, f"4-step LoRA, {kind} noise")
        for kind, (_, lora) in EXPERTS.items()
    }
    links = {f"{kind}_noise": (f"{kind}_lora", 0) for kind in EXPERTS}
    values = {"boundary": BOUNDARY}
    nodes["model"] = Node("FrugalWanTwoExperts", column + 2, values, links, size=(380, 130))
    return nodes


def sampled(column: int, latent: str, plan: str = "plan") -> Node:
    """Four steps as the LoRAs were trained. latent: key of a WanImageToVideo node."""
    links = {"positive": (latent, 0), "negative": (latent, 1), "latent_image": (latent, 2)}
    values = {
        "preset": "distilled", "seed": 7, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple",
    }  # fmt: skip
    return Node(
        "FrugalSampler", column, values, {"model": (plan, 0), **links}, title="Four steps",
        size=(380, 460),
    )  # fmt: skip


def planned(column: int, size: dict[str, int], latent: str) -> dict[str, Node]:
    """The shift that the LoRAs were trained with, and the memory plan, one under the other."""
    values = {
        "width": size["width"], "height": size["height"], "frames": size["length"],
        "guidance": False, "budget_gb": BUDGET_GB,
    }  # fmt: skip
    links = {"model": ("shift", 0), "vae": ("vae", 0), "latent": (latent, 2)}
    return {
        "shift": Node("ModelSamplingSD3", column, {"shift": SHIFT}, {"model": ("model", 0)}),
        "plan": Node("FrugalMemoryPlan", column, values, links, size=(380, 420)),
    }


def i2v_4steps(experts: bool) -> dict[str, Node]:
    """experts: Wan 2.2's two; else Wan 2.1, which also looks at the picture through CLIP."""
    if experts:
        nodes = both_experts(0)
    else:
        nodes = {
            "wan": load_wan(I2V_LARGE, 0, "Wan 2.1 image to video"),
            "model": unmerged_lora(LORA_21, 1, "wan", "4-step LoRA"),
            "vision": Node(
                "CLIPVisionLoader", 0, {"clip_name": VISION},
                models=public_file(VISION, "clip_vision"),
            ),
            "look": Node(
                "CLIPVisionEncode", 1, {"crop": "none"},
                {"clip_vision": ("vision", 0), "image": ("picture", 0)},
            ),
        }  # fmt: skip
    nodes |= {
        "vae": Node("VAELoader", 0, {"vae_name": VAE}, models=public_file(VAE, "vae")),
        "picture": Node(
            "LoadImage", 0, {"image": FIRST_FRAME}, title="First frame", size=(380, 340)
        ),
        "text": Node(
            "FrugalCachedTextEncode",
            1,
            {"encoder_name": ENCODER, "positive_text": PROMPT, "negative_text": NEGATIVE},
            title="What moves",
            size=(380, 300),
            models=public_file(ENCODER, "text_encoders"),
        ),
    }
    links = {
        "positive": ("text", 0), "negative": ("text", 1), "vae": ("vae", 0),
        "start_image": ("picture", 0),
    }  # fmt: skip
    if not experts:
        links["clip_vision_output"] = ("look", 0)
    return nodes | {
        "i2v": Node("WanImageToVideo", 2, UPRIGHT, links, title="Size and length", size=(380, 240)),
        **planned(3, UPRIGHT, "i2v"),
        "chart": Node(
            "PreviewImage", 4, {}, {"images": ("plan", 3)}, title="Memory by phase",
            size=(480, 340),
        ),
        "sample": sampled(4, "i2v"),
        "decode": Node(
            "FrugalWanDecodeToFile",
            5,
            {"filename_prefix": "frugal/i2v_4steps", "fps": 16.0},
            {"samples": ("sample", 0), "vae": ("vae", 0)},
            title="The video",
            size=(480, 660),
        ),
    }  # fmt: skip


def _note(title: str, files: list[tuple[str, str]], mirror: str, size: str) -> Note:
    return Note(
        f"""## {title}

1. Let ComfyUI fetch the files (the panel of missing models), or put them there yourself:

{listed(files)}

2. Choose a picture under *First frame*, write what moves, set **budget_gb** in *Memory Plan*.
3. **Run**. The video goes straight into `output/frugal`.

| card | file | budget_gb | sampling |
|---|---|---|---|
| 8 GB | W4A8, or Q4 GGUF | 7 | 6 min |
| 12 GB | fp8_scaled, W4A8 | 11 | 6 min |
| 16 GB | fp8_scaled, W4A8 | 15 | 3 min |
| 24 GB | fp8_scaled | 23 | 90 s |

**Estimates**, not measured: four steps at 480 x 832, 81 frames are about 6,800 TFLOP, divided by
20, 20, 40 and 80 TFLOPS. That each row fits is the plan's own figure. {size}

W4A8 files are made from the fp16 ones with the graph `quantize_wan`. The budget leaves 1 GB of the
card to the system.

The LoRA is not merged, so the quantised weights are not rounded a second time. No guidance: cfg is
1, and the negative prompt does nothing.

A mirror for China: {mirror}.""",
        (500, 900),
    )


SHARED = [("text_encoders", ENCODER), ("vae", VAE)]
MIRROR = "https://modelscope.cn/models/Comfy-Org"
WAN22_NOTE = _note(
    "Wan 2.2 14B: a picture to video in 4 steps, on 12 GB",
    [
        ("diffusion_models", I2V_HIGH), ("diffusion_models", I2V_LOW), ("loras", LORA_HIGH),
        ("loras", LORA_LOW), *SHARED,
    ],
    f"[Wan 2.2]({MIRROR}/Wan_2.2_ComfyUI_Repackaged), "
    f"[text encoder]({MIRROR}/Wan_2.1_ComfyUI_repackaged)",
    "The two files are 29 GB in fp8 and 17 GB in W4A8: have 48 or 32 GB of main memory.",
)  # fmt: skip
WAN21_NOTE = _note(
    "Wan 2.1 14B: a picture to video in 4 steps, on 12 GB",
    [
        ("diffusion_models", I2V_LARGE), ("loras", LORA_21), ("clip_vision", VISION), *SHARED,
    ],
    f"[Wan 2.1]({MIRROR}/Wan_2.1_ComfyUI_repackaged), "
    "[LoRA](https://modelscope.cn/models/Kijai/WanVideo_comfy)",
    "The file is 17 GB in fp8: have 32 GB of main memory.",
)  # fmt: skip
