"""Models and modules built on Wan that this loader cannot run: what they are, where they work."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import FrugalError

PATCH = "put it in models/model_patches and load it with Load Model Patch, beside its base model"
WRAPPER = "use it with nodes made for it, such as ComfyUI-WanVideoWrapper"


@dataclass(frozen=True)
class Relative:
    """`names`: expression for names of tensors that only this family has. `module`: what such a
    file is if it holds no video model of its own, with what to do; `whole`: if it holds one.
    """

    names: re.Pattern[str]
    module: tuple[str, str]
    whole: tuple[str, str]


def _relative(names: str, module: tuple[str, str], whole: tuple[str, str] | None = None):
    return Relative(re.compile(names), module, whole or module)


RELATIVES = (
    _relative(
        r"audio_proj\.proj1\.|blocks\.\d+\.audio_cross_attn\.",
        ("an InfiniteTalk or MultiTalk module", PATCH),
        (
            "a model with an InfiniteTalk or MultiTalk module merged in",
            "choose the base model, and load the module by itself with Load Model Patch",
        ),
    ),
    _relative(r"controlnet_patch_embedding\.|controlnet_blocks\.", ("a Uni3C module", PATCH)),
    _relative(
        r"fps_embedding\.|fps_projection\.",
        (
            "a SkyReels-V2 diffusion forcing model, whose frame rate ComfyUI leaves out",
            f"choose SkyReels-V2 T2V or I2V without DF, or {WRAPPER}",
        ),
    ),
    _relative(
        r"gate_compress\b",
        (
            "a FastWan model for video sparse attention (VSA), which ComfyUI does not compute",
            "choose the FullAttn file of FastWan, or its LoRA on the base model",
        ),
    ),
    _relative(
        r"\bcam_encoder\.", ("a ReCamMaster model, with a camera that ComfyUI leaves out", WRAPPER)
    ),
    _relative(r"dwpose_embedding\.|randomref_embedding", ("a UniAnimate module", WRAPPER)),
    _relative(r"\bproj_model\.|\bcross_attn\.processor\.", ("a FantasyTalking module", WRAPPER)),
)
REMOVER = (
    "a Wan model without text conditioning, as MiniMax-Remover is",
    "use it with the nodes made for it: every Wan model of ComfyUI needs a text",
)


def refuse_relative(file: str, names: Collection[str]) -> None:
    """Raises FrugalError, which names the family, where the tensors `names` are one of RELATIVES;
    names may be those of any convention.
    """
    whole = any(name.endswith(("head.modulation", "text_embedder.linear_1.bias")) for name in names)
    for relative in RELATIVES:
        example = next((name for name in names if relative.names.search(name)), None)
        if example is not None:
            what, do = relative.whole if whole else relative.module
            raise _refusal(file, example, what, do)
    if whole or any("time_embedder.linear_1" in name for name in names):
        parts = ("text_embedding.", "text_embedder.")
        if not any(part in name for name in names for part in parts):
            example = next(name for name in names if "time_embed" in name or "head." in name)
            raise _refusal(file, example, *REMOVER)


def _refusal(file: str, example: str, what: str, do: str) -> FrugalError:
    return FrugalError(
        f"{file} holds {ascii(example)[1:-1][:80]} and is {what}",
        "a Wan video model that ComfyUI runs as it is",
        do,
    )
