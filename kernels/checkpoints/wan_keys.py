"""Names of Wan tensors: from whatever a file uses to the canonical names, those of the original
release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import FrugalError

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
ORIGINAL_ANCHOR = "head.modulation"
DIFFUSERS_ANCHORS = ("scale_shift_table", "condition_embedder.text_embedder.linear_1.bias")
# Parts of an all-in-one checkpoint, or of a training state, that are not the video model.
COMPANIONS = (
    "vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.",
    "clip_vision.",
    "generator.", "critic.", "discriminator.", "fake_score.", "real_score.", "optimizer.",
    "generator_optimizer.", "critic_optimizer.",
)  # fmt: skip

_DIFFUSERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"^((?:vace_)?blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
        (r"^((?:vace_)?blocks\.\d+)\.attn1\.", r"\1.self_attn."),
        (r"^((?:vace_)?blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
        (r"_attn\.to_out\.0\.", "_attn.o."),
        (r"_attn\.to_([qkv])\.", r"_attn.\1."),
        (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
        (r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
        # Their norm2 is the norm before cross-attention, which the original calls norm3.
        (r"^((?:vace_)?blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"^((?:vace_)?blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
        (r"^((?:vace_)?blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
        (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
        (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
    )
)


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
        if self.diffusers:
            for pattern, replacement in _DIFFUSERS:
                name = pattern.sub(replacement, name)
        return name

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


def strip_wrappers(name: str) -> str:
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
