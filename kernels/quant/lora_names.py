"""The names under which LoRA files speak of the layers of a Wan model.

Trainers use the original names or those of diffusers, whole or with underscores, under one of a few
prefixes: kohya and musubi `lora_unet_`, LyCORIS `lycoris_`, OneTrainer `lora_transformer_`, peft
`base_model.model.`, Finetrainers and diffusers `transformer.`, others `diffusion_model.` or none.
"""

from __future__ import annotations

import re

DOTTED = (
    "", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.",
    "base_model.model.transformer.",
)  # fmt: skip
JOINED = ("lora_unet_", "lycoris_", "lora_transformer_")

_TO_DIFFUSERS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
        (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
        (r"^time_projection\.1$", "condition_embedder.time_proj"),
        (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
        (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
        (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
        (r"^head\.head$", "proj_out"),
        (r"(_attn)\.o$", r"\1.to_out.0"),
        (r"(_attn)\.([qkv])$", r"\1.to_\2"),
        (r"(_attn)\.([kv])_img$", r"\1.add_\2_proj"),
        (r"(_attn)\.norm_k_img$", r"\1.norm_added_k"),
        (r"(blocks\.\d+)\.norm3$", r"\1.norm2"),
        (r"(blocks\.\d+)\.ffn\.0$", r"\1.ffn.net.0.proj"),
        (r"(blocks\.\d+)\.ffn\.2$", r"\1.ffn.net.2"),
        (r"(vace_blocks\.\d+)\.before_proj$", r"\1.proj_in"),
        (r"(vace_blocks\.\d+)\.after_proj$", r"\1.proj_out"),
        (r"(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
        (r"(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    )
)


def diffusers_name(layer: str) -> str:
    """The diffusers name of a layer given by its original name, such as blocks.0.self_attn.q."""
    for pattern, replacement in _TO_DIFFUSERS:
        layer = pattern.sub(replacement, layer)
    return layer


def aliases(layer: str) -> list[str]:
    """Every name of a layer in LoRA files, without the ending; `layer` is its original name."""
    found = []
    for name in dict.fromkeys((layer, diffusers_name(layer))):
        found += [prefix + name for prefix in DOTTED]
        found += [prefix + name.replace(".", "_") for prefix in JOINED]
    return found
