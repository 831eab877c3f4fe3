"""How three servers want a video to be asked for on POST /v1/videos.

All omit what a client leaves out and put a default of their own in its place, often not the
model's. So every field goes along, and a wish that a dialect has no field for is refused here
rather than dropped there.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from ..kernels.errors import FrugalError

# Sides are cut down to multiples of this, and frames to 4 n + 1, by the servers or their models.
SIDE = 16


@dataclass(frozen=True)
class VideoWish:
    """width, height in px; frames 4 n + 1; flow_shift 0: the server's own; image: PNG bytes or
    none.
    """

    prompt: str
    negative: str
    model: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    flow_shift: float
    seed: int
    image: bytes = b""

    @property
    def size(self) -> str:
        """Width x height, as the servers write it."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Dialect:
    """body(wish): arguments of one request, made anew for each try. flow_shift: the server heeds
    that field for Wan. SGLang accepts it and does so for other models only.
    """

    name: str
    body: Callable[[VideoWish], Mapping[str, Any]]
    flow_shift: bool = False


def _common(wish: VideoWish) -> dict[str, Any]:
    fields = {
        "prompt": wish.prompt,
        "negative_prompt": wish.negative,
        "size": wish.size,
        "num_frames": wish.frames,
        "fps": wish.fps,
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance,
        "seed": wish.seed % 2**31,
    }
    return fields | ({"model": wish.model} if wish.model else {})


def _form(fields: Mapping[str, Any], image: bytes) -> Mapping[str, Any]:
    # Multipart even without a file: vLLM-Omni reads nothing else.
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, str(value))
    if image:
        form.add_field("input_reference", image, filename="first.png", content_type="image/png")
    return {"data": form}


def _vllm_omni(wish: VideoWish) -> Mapping[str, Any]:
    fields = _common(wish)
    if wish.flow_shift:
        fields["flow_shift"] = wish.flow_shift
    return _form(fields, wish.image)


def _tensorrt_llm(wish: VideoWish) -> Mapping[str, Any]:
    fields = _common(wish)
    if wish.image:
        picture = base64.b64encode(wish.image).decode()
        fields["image_reference"] = {"content": f"data:image/png;base64,{picture}"}
    return {"json": fields}


def _sglang(wish: VideoWish) -> Mapping[str, Any]:
    fields = _common(wish)
    return _form(fields, wish.image) if wish.image else {"json": fields}


VLLM, TRTLLM, SGLANG = "vLLM-Omni", "TensorRT-LLM", "SGLang"
DIALECTS = {
    VLLM: Dialect(VLLM, _vllm_omni, flow_shift=True),
    TRTLLM: Dialect(TRTLLM, _tensorrt_llm),
    SGLANG: Dialect(SGLANG, _sglang),
}


def checked(wish: VideoWish, dialect: Dialect) -> VideoWish:
    """The wish, if the server can fulfil it as it is; its prompt without blanks around it.

    Raises FrugalError for what a server would change or drop without a word.
    """
    if not wish.prompt.strip():
        raise FrugalError("an empty prompt", "what the video shows", "type a prompt")
    if wish.width % SIDE or wish.height % SIDE:
        raise FrugalError(
            f"a video of {wish.size}",
            f"sides that are multiples of {SIDE}",
            f"use {wish.width // SIDE * SIDE}x{wish.height // SIDE * SIDE}",
        )
    if wish.frames % 4 != 1:
        raise FrugalError(
            f"{wish.frames} frames",
            "4 n + 1, since Wan has one latent frame for four",
            f"use {(wish.frames - 1) // 4 * 4 + 1} or {(wish.frames + 2) // 4 * 4 + 1}",
        )
    if wish.flow_shift and not dialect.flow_shift:
        raise FrugalError(
            f"flow_shift {wish.flow_shift:g} for {dialect.name}",
            "0, since it takes none for Wan and uses its own",
            "set flow_shift to 0",
        )
    return replace(wish, prompt=wish.prompt.strip())


def takes_images(listed: Any) -> bool | None:
    """Whether the model that a server lists takes a start image: by SGLang's task_type, else by its
    names; None if nothing says so.
    """
    words: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, Mapping):
            for name, each in value.items():
                if name in ("id", "root", "model_path", "task_type", "data"):
                    collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)
        elif isinstance(value, str):
            words.append(value.lower())

    collect(listed)
    text = " ".join(words)
    image = any(kind in text for kind in ("i2v", "image-to-video", "ti2v", "flf2v"))
    words_only = any(kind in text.replace("ti2v", "") for kind in ("t2v", "text-to-video"))
    return image if image != words_only else None
