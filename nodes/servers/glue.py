"""What the nodes that speak with a server need of ComfyUI."""

from __future__ import annotations

import io
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import folder_paths
import torch
from PIL import Image, ImageOps

from ...servers.waiting import run

T = TypeVar("T")
LONGEST_SIDE = 768
FOLDER = "frugal_prompts"
# Advised for Qwen 3.5 without thinking.
CLIP_SETTINGS = {"top_k": 20, "top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.0}


def wait_for(work: Coroutine[Any, Any, T], tick: Callable[[], None] = lambda: None) -> T:
    """The result of `work`; ComfyUI's cancel button ends it. `tick` is called while it lasts."""

    def check() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        tick()

    return run(work, check)


def prompts_folder() -> Path:
    """Where rewritten prompts are kept, in the user's folder."""
    return Path(folder_paths.get_user_directory()) / FOLDER


def typed(hidden: Any, widgets: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the widgets that were typed in, not wired, by the graph that is being run."""
    node = (hidden.prompt or {}).get(hidden.unique_id, {}).get("inputs", {})
    return {name: value for name, value in widgets.items() if not isinstance(node.get(name), list)}


def png(images: torch.Tensor | None) -> bytes:
    """The first of the images [B, H, W, C] as PNG, its longer side at most LONGEST_SIDE."""
    if images is None:
        return b""
    picture = _picture(images)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return _as_png(picture)


def fitted_png(images: torch.Tensor | None, width: int, height: int) -> bytes:
    """The first of the images [B, H, W, C] as PNG of width x height: its middle, scaled."""
    if images is None:
        return b""
    return _as_png(ImageOps.fit(_picture(images), (width, height), Image.Resampling.LANCZOS))


def _picture(images: torch.Tensor) -> Image.Image:
    pixels = images[0, ..., :3].detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(pixels.numpy())


def _as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def writes_text(clip: Any) -> bool:
    """Whether this CLIP input holds a language model that ComfyUI can let write: every text encoder
    has the method, only a language model's transformer does too.
    """
    encoder = getattr(clip, "cond_stage_model", None)
    inner = getattr(encoder, getattr(encoder, "clip", None) or "", encoder)
    return hasattr(clip, "generate") and hasattr(getattr(inner, "transformer", None), "generate")


def write_text(
    clip: Any, text: str, image: torch.Tensor | None, seed: int, max_tokens: int, heat: float
) -> str:
    """What the language model in `clip` answers, without thinking, in its own chat template."""
    tokens = clip.tokenize(text, image=image, skip_template=False, min_length=1, thinking=False)
    ids = clip.generate(
        tokens, do_sample=True, max_length=max_tokens, temperature=heat, seed=seed, **CLIP_SETTINGS
    )
    return clip.decode(ids)
