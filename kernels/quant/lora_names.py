"""The names under which LoRA files speak of the layers of a Wan model.

Trainers use the original names or those of diffusers, whole or with underscores, under one of a few
prefixes: kohya and musubi `lora_unet_`, LyCORIS `lycoris_`, OneTrainer `lora_transformer_`, peft
`base_model.model.`, Finetrainers and diffusers `transformer.`, others `diffusion_model.` or none.
"""

from __future__ import annotations

from ..checkpoints.diffusers_names import to_diffusers

DOTTED = (
    "", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.",
    "base_model.model.transformer.",
)  # fmt: skip
JOINED = ("lora_unet_", "lycoris_", "lora_transformer_")


def aliases(layer: str) -> list[str]:
    """Every name of a layer in LoRA files, without the ending; `layer` is its original name."""
    found = []
    for name in dict.fromkeys((layer, to_diffusers(layer))):
        found += [prefix + name for prefix in DOTTED]
        found += [prefix + name.replace(".", "_") for prefix in JOINED]
    return found
