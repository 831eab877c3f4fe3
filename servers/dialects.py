"""How three servers want a video to be asked for on POST /v1/videos.

All omit what a client leaves out and put a default of their own in its place, often not the
model's. So every field goes along, and a field that a dialect has no field for is refused here
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
class VideoRequest:
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
    """body(request): arguments of one request, made again for each try. flow_shift: the server
    uses that field for Wan. SGLang accepts it and does so for other models only.
    """

    name: str
    body: Callable[[VideoRequest], Mapping[str, Any]]
    flow_shift: bool = False


def _common(request: VideoRequest) -> dict[str, Any]:
    fields = {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "size": request.size,
        "num_frames": request.frames,
        "fps": request.fps,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "seed": request.seed % 2**31,
    }
    return fields | ({"model": request.model} if request.model else {})


def _form(fields: Mapping[str, Any], image: bytes) -> Mapping[str, Any]:
    # Multipart even without a file: vLLM-Omni reads nothing else.
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, str(value))
    if image:
        form.add_field("input_reference", image, filename="first.png", content_type="image/png")
    return {"data": form}


def _vllm_omni(request: VideoRequest) -> Mapping[str, Any]:
    fields = _common(request)
    if request.flow_shift:
        fields["flow_shift"] = request.flow_shift
    return _form(fields, request.image)


def _tensorrt_llm(request: VideoRequest) -> Mapping[str, Any]:
    fields = _common(request)
    if request.image:
        picture = base64.b64encode(request.image).decode()
        fields["image_reference"] = {"content": f"data:image/png;base64,{picture}"}
    return {"json": fields}


def _sglang(request: VideoRequest) -> Mapping[str, Any]:
    fields = _common(request)
    return _form(fields, request.image) if request.image else {"json": fields}


VLLM, TRTLLM, SGLANG = "vLLM-Omni", "TensorRT-LLM", "SGLang"
DIALECTS = {
    VLLM: Dialect(VLLM, _vllm_omni, flow_shift=True),
    TRTLLM: Dialect(TRTLLM, _tensorrt_llm),
    SGLANG: Dialect(SGLANG, _sglang),
}


def checked(request: VideoRequest, dialect: Dialect) -> VideoRequest:
    """The request, if the server can fulfil it as it is; its prompt without blanks around it.

    Raises FrugalError for what a server would change or drop silently.
    """
    if not request.prompt.strip():
        raise FrugalError("an empty prompt", "what the video shows", "type a prompt")
    if request.width % SIDE or request.height % SIDE:
        raise FrugalError(
            f"a video of {request.size}",
            f"sides that are multiples of {SIDE}",
            f"use {request.width // SIDE * SIDE}x{request.height // SIDE * SIDE}",
        )
    if request.frames % 4 != 1:
        raise FrugalError(
            f"{request.frames} frames",
            "4 n + 1, since Wan has one latent frame for four",
            f"use {(request.frames - 1) // 4 * 4 + 1} or {(request.frames + 2) // 4 * 4 + 1}",
        )
    if request.flow_shift and not dialect.flow_shift:
        raise FrugalError(
            f"flow_shift {request.flow_shift:g} for {dialect.name}",
            "0, since it takes none for Wan and uses its own",
            "set flow_shift to 0",
        )
    return replace(request, prompt=request.prompt.strip())


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
