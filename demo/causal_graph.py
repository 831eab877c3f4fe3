"""The graphs that make a video block by block: a long one from a picture, and one with two ends."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .public_files import CAUSAL, ENCODER, VAE, listed
from .wan_graph import FIRST_FRAME, WIDE, loaders, text

PRESET = "Causal-Forcing framewise"
SECONDS = 10
SIZE = {"width": WIDE["width"], "height": WIDE["height"]}
LATER = 5.0  # seconds after which the prompt changes


def _causal(column: int) -> Node:
    """What the preset of the sampler sets too; it is repeated here for the plan and the report."""
    values = {"window": 21, "sink": 0, "shift": 5.0}
    return Node("FrugalCausalModel", column, values, {"wan_model": ("wan", 0)}, size=(380, 330))


def _length(column: int, frames: int) -> Node:
    return Node(
        "EmptyHunyuanLatentVideo", column, {**WIDE, "length": frames}, title="Size and length"
    )


def long_video() -> dict[str, Node]:
    """A picture that moves for ten seconds, with a second prompt half way, written while it is
    sampled.
    """
    nodes = loaders(CAUSAL) | {
        "picture": Node(
            "LoadImage", 0, {"image": FIRST_FRAME}, title="First frame", size=(380, 340)
        ),
        "latent": _length(0, SECONDS * 16 + 1),
        "causal": _causal(1),
        "fitted": Node(
            "ImageScale",
            1,
            {**SIZE, "upscale_method": "lanczos", "crop": "center"},
            {"image": ("picture", 0)},
            title="First frame in the video's size",
        ),
        "start": Node(
            "FrugalWanEncode",
            2,
            {},
            {"vae": ("vae", 0), "images": ("fitted", 0)},
            title="First frame as latent",
            size=(380, 200),
        ),
    }
    nodes |= text("first", 1, "the person smiles and looks around, soft daylight", "Prompt: start")
    nodes |= text("later", 1, "the person laughs and waves at the camera", "Prompt: later")
    return nodes | {
        "prompts": Node(
            "FrugalCausalPrompt",
            2,
            {"from_second": LATER},
            {"conditioning": ("later", 0)},
            title="When it changes",
        ),
        "film": Node(
            "FrugalCausalVideoFile",
            3,
            {
                "seed": 7,
                "steps": 4,
                "cfg": 1.0,
                "frames_per_block": 1,
                "filename_prefix": "frugal/long",
                "fps": 16.0,
                "decode_every": 3,
                "preset": PRESET,
            },
            {
                "causal_model": ("causal", 0),
                "positive": ("first", 0),
                "negative": ("first", 1),
                "latent": ("latent", 0),
                "vae": ("vae", 0),
                "prompts": ("prompts", 0),
                "start_latent": ("start", 0),
            },
            title="The video, written while it is sampled",
            size=(480, 1040),
        ),
    }


def causal_video() -> dict[str, Node]:
    """A video block by block, and two ways on from the same frames."""
    prompts = {
        "first": ("a sailing boat leaves the harbour at dawn, calm sea, wide shot", "the start"),
        "storm": ("the same boat in a rising storm, high waves, dark clouds", "on, a storm"),
        "calm": ("the same boat glides into a quiet bay, evening sun", "on, a quiet bay"),
    }
    nodes = loaders(CAUSAL)
    for key, (words, title) in prompts.items():
        nodes |= text(key, 1, words, f"Prompt: {title}")
    nodes |= {"latent": _length(0, WIDE["length"]), "causal": _causal(1)}
    for place, (key, before) in enumerate((("first", ""), ("storm", "first"), ("calm", "first"))):
        links = {
            "causal_model": ("causal", 0),
            "positive": (key, 0),
            "negative": (key, 1),
            "latent": ("latent", 0),
        }
        if before:
            links["session"] = (f"{before}_made", 1)
        column = 3 if before else 2
        nodes[f"{key}_made"] = Node(
            "FrugalCausalSampler",
            column,
            {
                "seed": 7 + place,
                "steps": 4,
                "cfg": 1.0,
                "frames_per_block": 1,
                "keep_session": not before,
                "preset": PRESET,
            },
            links,
            title=f"Sample: {prompts[key][1]}",
            size=(380, 400),
        )
        nodes[f"{key}_file"] = Node(
            "FrugalWanDecodeToFile",
            column + 1,
            {"filename_prefix": f"frugal/causal_{key}", "fps": 16.0},
            {"samples": (f"{key}_made", 0), "vae": ("vae", 0)},
            title=f"Video: {prompts[key][1]}",
            size=(420, 520),
        )
    return nodes


LONG_GROUPS = [
    Group("1. Files, picture, length", 0, 0),
    Group("2. Prompts and first frame", 1, 2),
    Group("3. Sample and decode", 3, 3, "#3f9e6b"),
]
CAUSAL_GROUPS = [
    Group("1. Files and length", 0, 0),
    Group("2. Prompts", 1, 1),
    Group("3. Block by block", 2, 4, "#3f9e6b"),
]
FILES = listed([("diffusion_models", CAUSAL), ("text_encoders", ENCODER), ("vae", VAE)])
TRAINED = """The weights are Causal Forcing's, framewise, in four steps: the file that ComfyUI's own
template `video_causal_forcing_i2v` links. They were trained on five seconds; what comes after that
drifts. For other causal weights choose the **preset** of the same name. A Wan that was trained on
whole clips runs too, but its videos fall apart."""
LONG_NOTE = Note(
    f"""## A video of any length from one picture

{FILES}

A causal Wan generates one latent frame after the other and attends to the cached ones, so memory
stops growing once its window is full. Finished frames go into the file while later ones are being
sampled; stop whenever you like, what is there plays.

- **length** of *Size and length*: 16 frames are one second. Another width or height: change it in
  *First frame in the video's size* too.
- *When it changes*: from which second the second prompt counts. Chain more of these nodes.
- 1.3B in fp16 is 2.8 GB of weights: a card with 8 GB is enough. Connect *Memory Plan* behind
  *Causal Model* to see the figures for yours.

{TRAINED}""",
    (460, 640),
)
CAUSAL_NOTE = Note(
    f"""## One start, two continuations

{FILES}

The first sampler keeps its **session**; two others continue it and share its cached frames. Save a
session with *Save Causal Session* to continue another day.

{TRAINED}""",
    (460, 520),
)
