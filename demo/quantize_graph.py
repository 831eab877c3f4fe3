"""The graphs that quantise a Wan model: as it is, and with a calibration, a size and a check."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .public_files import ENCODER, T2V_LARGE, T2V_SMALL, VAE, public_file

CALIBRATION, SIZE = "wan2.1_t2v_1.3B", 1.2
RESULT = f"{CALIBRATION}_{SIZE:g}GB"
CHART = (600, 440)


def _chart(column: int, source: str, slot: int, title: str, muted: bool = False) -> Node:
    links = {"images": (source, slot)}
    return Node("PreviewImage", column, {}, links, title=title, size=CHART, muted=muted)


def quantize_wan() -> dict[str, Node]:
    """One file to int8 and to W4A8, each with the picture of what was lost."""
    nodes = {}
    for key, target in (("int8", "int8 ConvRot"), ("w4a8", "W4A8")):
        nodes[key] = Node(
            "FrugalQuantize",
            0,
            {"model_name": T2V_LARGE, "format": target, "filename_prefix": "wan2.1_t2v_14B"},
            title=f"To {target}",
            size=(380, 540),
            models=public_file(T2V_LARGE, "diffusion_models"),
        )
        nodes[f"{key}_chart"] = _chart(1, key, 2, f"What {target} loses")
    return nodes


def calibrate_wan() -> dict[str, Node]:
    """Record a model while it samples; then quantise it to a size; then check the result. The
    later steps are muted, since each needs the files of the one before.
    """
    return {
        "wan": Node(
            "FrugalLoadWan",
            0,
            {"model_name": T2V_SMALL},
            size=(380, 220),
            models=public_file(T2V_SMALL, "diffusion_models"),
        ),
        "shift": Node("ModelSamplingSD3", 0, {"shift": 8.0}, {"model": ("wan", 0)}),
        "clip": Node(
            "CLIPLoader",
            0,
            {"clip_name": ENCODER, "type": "wan"},
            models=public_file(ENCODER, "text_encoders"),
        ),
        "vae": Node("VAELoader", 0, {"vae_name": VAE}, models=public_file(VAE, "vae")),
        "calibrate": Node(
            "FrugalCalibrate",
            1,
            {"name": CALIBRATION, "measure_layers": True},
            {"model": ("shift", 0)},
            size=(380, 330),
        ),
        "positive": Node(
            "CLIPTextEncode",
            1,
            {"text": "a red fox walks through fresh snow, soft morning light, the camera follows"},
            {"clip": ("clip", 0)},
            title="Your prompt",
            size=(380, 130),
        ),
        "negative": Node(
            "CLIPTextEncode",
            1,
            {"text": "blurry, distorted, static, worst quality"},
            {"clip": ("clip", 0)},
            size=(380, 110),
        ),
        "latent": Node(
            "EmptyHunyuanLatentVideo",
            1,
            {"width": 832, "height": 480, "length": 33},
            title="Size and length",
        ),
        "sample": Node(
            "KSampler",
            2,
            {
                "seed": 7,
                "steps": 20,
                "cfg": 6.0,
                "sampler_name": "uni_pc",
                "scheduler": "simple",
            },
            {
                "model": ("calibrate", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("latent", 0),
            },
        ),
        "save": Node(
            "FrugalWanDecodeToFile",
            2,
            {"filename_prefix": "frugal/calibrate", "fps": 16.0},
            {"samples": ("sample", 0), "vae": ("vae", 0)},
            title="The clip, as without the node",
            size=(380, 560),
        ),
        "quantize": Node(
            "FrugalQuantize",
            3,
            {
                "model_name": T2V_SMALL,
                "format": "target size",
                "size_gb": SIZE,
                "calibration": f"{CALIBRATION}.safetensors",
                "filename_prefix": CALIBRATION,
            },
            size=(CHART[0], 560),
            muted=True,
        ),
        "quantize_chart": _chart(3, "quantize", 2, "What each block loses", muted=True),
        "result": Node(
            "FrugalLoadWan", 4, {"model_name": f"{RESULT}.safetensors"}, size=(380, 220), muted=True
        ),
        "check": Node(
            "FrugalQualityCheck",
            4,
            {
                "calibration": f"{CALIBRATION}.safetensors",
                "quality_file": f"{RESULT}.quality.json",
            },
            {"model": ("result", 0)},
            size=(CHART[0], 420),
            muted=True,
        ),
        "check_chart": _chart(4, "check", 2, "What the model loses", muted=True),
    }


QUANTIZE_GROUPS = [
    Group("Convert", 0, 0),
    Group("What was lost", 1, 1, "#3f9e6b"),
]
QUANTIZE_NOTE = Note(
    f"""## Make a Wan model smaller

Each node writes a new file into `models/diffusion_models` that ComfyUI loads by itself (a version
with comfy-kitchen; older ones read `fp8`). Nothing is sampled here, and no graphics memory is
needed. Choose your own model at the top; the source here is

- `models/diffusion_models/{T2V_LARGE}`

**int8 ConvRot** loses least for one byte per weight. **W4A8** is for cards where that does not fit;
it loses less with a calibration, see `calibrate_wan`. The charts show the errors of the layers'
weights by block. Interrupted work resumes when it is queued again.""",
    (420, 420),
)
CALIBRATE_GROUPS = [
    Group("1. Record while sampling", 0, 2),
    Group("2. Quantise to a target size (muted)", 3, 3, "#3f9e6b"),
    Group("3. Check end to end (muted)", 4, 4, "#9e6b3f"),
]
CALIBRATE_NOTE = Note(
    f"""## Quantise by what your own prompts need

1. **Queue**: the model samples as usual, and `models/calibration/{CALIBRATION}.safetensors` is
   written when it is done. Queue several of your own prompts; each adds to the file.
2. Mute group 1, unmute group 2 (select its nodes, Ctrl+M), press R to refresh the lists, queue.
   Every layer gets the format that fits **size_gb** with the smallest error of the output.
3. Mute group 2, unmute group 3, press R, queue: the new file runs on model calls saved from
   the original, and the report says how far its outputs differ.

Files:

- `models/diffusion_models/{T2V_SMALL}`
- `models/text_encoders/{ENCODER}`
- `models/vae/{VAE}`

For the 14B model choose it in both places and set 9 to 12 GB; recording needs the unquantised model
to sample, so have the main memory for it. Turn **measure_layers** off if recording takes too
long.""",
    (440, 560),
)
