"""The graph that lets servers work: one extends the prompt, one makes the video."""

from __future__ import annotations

from .graph_builder import Group, Node, Note
from .wan_graph import NEGATIVE

PROMPT = "a red fox walks through fresh snow"


def _film(prefix: str, links: dict[str, tuple[str, int]], title: str, muted: bool = False) -> Node:
    values = {
        "negative_prompt": NEGATIVE,
        "flow_shift": 3.0,
        "seed": 7,
        "filename_prefix": f"frugal/{prefix}",
    }
    return Node("FrugalRemoteVideo", 1, values, links, title=title, size=(440, 800), muted=muted)


def remote_video() -> dict[str, Node]:
    """Words -> a language model's words -> a video from text; and, muted, one from a picture."""
    return {
        "extend": Node(
            "FrugalPromptExtend",
            0,
            {"text": PROMPT},
            title="Your prompt, extended by a language model",
            size=(420, 560),
        ),
        "picture": Node(
            "LoadImage", 0, {"image": "example.png"}, title="First frame", size=(340, 340),
            muted=True,
        ),
        "film": _film("remote", {"prompt": ("extend", 0)}, "Text to video"),
        "film_from_picture": _film(
            "remote_i2v",
            {"prompt": ("extend", 0), "image": ("picture", 0)},
            "Image to video (muted)",
            muted=True,
        ),
    }  # fmt: skip


REMOTE_GROUPS = [
    Group("1. Prompt", 0, 0),
    Group("2. Video", 1, 1, "#3f9e6b"),
]
REMOTE_NOTE = Note(
    """## A video made by servers

Nothing is loaded on this machine. Start a server for each part, then type its address:

- **Prompt**: any OpenAI-compatible server, such as
  `vllm serve Qwen/Qwen3-4B --port 8000`. Without one the original prompt is used, and the node says
  why.
- **Video**: `vllm serve Wan-AI/Wan2.1-T2V-1.3B-Diffusers --omni --port 8091` (with vllm-omni), or
  TensorRT-LLM or SGLang: set **dialect**. Several addresses, one per line: if a server is down or
  full, the next one is tried.

Prompt and image are sent to these addresses and nowhere else. A server with a key: put the key
into an environment variable, and the variable's NAME into **key_variable**.

**flow_shift** 3 is for 480p, 5 for 720p; TensorRT-LLM and SGLang take 0 only.

For image to video start a server with an I2V model, unmute the image and the lower video node
(Ctrl+M), mute the upper one, and set **task** of the first node.

Each node says which server answered. The video is in `output/frugal` as the server sent it.
Which server suits which machine: `docs/engines.md`.""",
    (440, 560),
)
