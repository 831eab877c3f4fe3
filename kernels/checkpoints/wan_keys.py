"""Names of Wan tensors: from whatever a file uses to the canonical names, those of the original
release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import FrugalError
from .diffusers_names import to_original
from .header import TensorInfo

# Training wrappers add their own attribute name anywhere in the path.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# First match wins, so the averaged weights of a distilled student come before the raw ones.
PREFIXES = (
    "",
    "generator_ema.model.",
    "generator_ema.",
    "generator.model.",
    "generator.",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "module.",
    "net.",
    "transformer.",
)
# Where the weights of a Wan model or a relative lie, and words in the names of numbers that a
# computation may need: such a tensor is no label, however small.
PARTS = re.compile(
    r"(?:blocks|vace_blocks|head|\w*embedding\w*|\w*embedder|img_emb|ref_conv|control_adapter"
    r"|proj_out|time_projection|\w*_encoder|\w*_adapter|audio\w*|face\w*|motion\w*)(?:\.|$)"
)
NUMBERS = re.compile(r"scale|alpha|gamma|beta|gain|shift|factor|gate|sigma|mean|std|bias|weight")
# What an attention module of newer ComfyUI versions should compute with: JSON as bytes.
PREFERENCE = ".comfy_attention.config"
ORIGINAL_ANCHOR = "head.modulation"
DIFFUSERS_ANCHORS = ("scale_shift_table", "condition_embedder.text_embedder.linear_1.bias")
# Parts of an all-in-one checkpoint, or of a training state, that are not the video model.
COMPANIONS = (
    "vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.",
    "clip_vision.",
    "generator.", "critic.", "discriminator.", "fake_score.", "real_score.", "optimizer.",
    "generator_optimizer.", "critic_optimizer.",
)  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """How a file names its tensors: the prefix before every name, and whether the names are
    those of diffusers.
    """

    prefix: str
    diffusers: bool

    def canonical(self, name: str) -> str | None:
        """The canonical name of a file's tensor; None if the tensor lies outside the prefix."""
        name = strip_wrappers(name)
        if not name.startswith(self.prefix):
            return None
        name = name[len(self.prefix) :]
        return to_original(name) if self.diffusers else name

    def layer(self, name: str) -> str:
        """The canonical name of a layer, given with or without the prefix, as metadata may do
        either.
        """
        name = strip_wrappers(name)
        whole = name if name.startswith(self.prefix) else self.prefix + name
        return (self.canonical(f"{whole}.weight") or whole).removesuffix(".weight")

    def text(self) -> str:
        names = "diffusers names" if self.diffusers else "original names"
        return f"{names}, prefix '{self.prefix}' removed" if self.prefix else names


def is_label(name: str, info: TensorInfo) -> bool:
    """Whether a tensor only says something about the file, as Kijai's model_type.<name> or a
    counter of training steps do: at most one value, outside of every part of a model.
    """
    if info.numel > 1 or PARTS.match(name) or name == "scaled_fp8":
        return False
    return name.startswith("model_type.") or not NUMBERS.search(name)


def strip_wrappers(name: str) -> str:
    """The name without what FSDP and compiled modules put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_naming(file: str, names: Iterable[str]) -> Naming:
    """Which naming the tensors of `file` follow. Raises FrugalError if none does, saying what
    the file looks like.
    """
    present = {strip_wrappers(name) for name in names}
    found = [Naming(prefix, False) for prefix in PREFIXES if prefix + ORIGINAL_ANCHOR in present]
    found += [
        Naming(prefix, True)
        for prefix in PREFIXES
        if all(prefix + anchor in present for anchor in DIFFUSERS_ANCHORS)
    ]
    averaged = [naming for naming in found if naming.prefix.startswith("generator_ema.")]
    if (
        len(found) > 1
        and averaged
        and all(naming.prefix.startswith("generator") for naming in found)
    ):
        found = averaged
    if len(found) == 1:
        return found[0]
    if found:
        raise FrugalError(
            f"{file} holds {len(found)} models, under "
            f"{', '.join(repr(naming.prefix) for naming in found)}",
            "one Wan model",
            "choose a file with a single model",
        )
    raise _not_wan(file, present)


def _not_wan(file: str, present: set[str]) -> FrugalError:
    def has(*parts: str) -> bool:
        return any(all(part in name for part in parts) for name in present)

    kinds = (
        (
            has(".lora_") or has(".lora.") or has("lora_unet"),
            "a LoRA",
            "load it with a LoRA loader on top of a model",
        ),
        (has("decoder.middle.0.residual.0.gamma"), "a Wan VAE", "load it with Load VAE"),
        (
            has("DenseReluDense") or has("token_embedding.weight"),
            "a text encoder",
            "load it with Load CLIP",
        ),
        (
            has("vace_blocks."),
            "a VACE module without its base model",
            "choose a file that holds the whole VACE model",
        ),
        (
            has("double_blocks.") or has("joint_blocks."),
            "another model family",
            "use Load Diffusion Model",
        ),
        (
            has("input_blocks."),
            "a Stable Diffusion model",
            "use Load Checkpoint or Load Diffusion Model",
        ),
    )
    looks, do = next(
        ((f", which looks like {what}", do) for match, what, do in kinds if match),
        ("", "choose a Wan 2.1 file, or use Load Diffusion Model for other models"),
    )
    example = ascii(min(present, default="nothing"))[1:-1][:80]
    return FrugalError(
        f"{file} holds {len(present)} tensors (first {example}) and no head.modulation{looks}",
        "a Wan video model under one of the known prefixes",
        do,
    )
