"""How LoRA files name the layers of a Wan model, and what they hold for one.

Trainers use the original names or those of diffusers, with dots, with underscores or with both,
under prefixes that are put one before another: kohya and musubi `lora_unet_`, VideoX-Fun
`lora_unet__`, LyCORIS `lycoris_`, OneTrainer `lora_transformer_`, peft `base_model.model.`,
Finetrainers and diffusers `transformer.`, DiffSynth `pipe.dit.`, others `diffusion_model.` or none.
So a name is compared by its spelling: without prefixes, every dot an underscore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoints.diffusers_names import to_diffusers

PREFIXES = re.compile(
    "_*(?:(?:base_model|video_model|diffusion_model|model|transformer_2|transformer|pipe|dit|module"
    "|lora_unet|lora_transformer|lycoris|unet|net|generator_ema|generator|orig_mod"
    "|fsdp_wrapped_module)_+)*"
)
# As peft names the parts of one adapter; its saved files leave out the adapter's name.
PEFT = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?"
)
# LightX2V's ending for the parameter `modulation` of a block or of the head.
MODULATION = ".diff_m"
BIAS, MAGNITUDE = ".lora_B.bias", ".dora_scale"
_PARTS = {
    ("lora_A", "weight"): ".lora_A.weight",
    ("lora_B", "weight"): ".lora_B.weight",
    ("lora_B", "bias"): BIAS,
    ("lora_magnitude_vector", "weight"): MAGNITUDE,
}


def spelling(name: str) -> str:
    """A layer's name in a form that is the same for all trainers who use the same names."""
    joined = name.replace(".", "_")
    found = PREFIXES.match(joined)
    return joined[found.end() :] if found else joined


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of each layer -> the layer, given by its original name."""
    return {spelling(name): layer for layer in layers for name in (layer, to_diffusers(layer))}


@dataclass(frozen=True)
class Ending:
    """What follows a layer's name: in the words that ComfyUI's reader knows, or BIAS; and the
    adapter that it names.
    """

    text: str
    adapter: str = ""


def ending(text: str) -> Ending:
    """The ending of a key; one that is none of peft's stays as it is."""
    found = PEFT.fullmatch(text)
    if found is None:
        return Ending(BIAS if text == ".lora_up.bias" else text)
    part, adapter, suffix = found.groups()
    return Ending(_PARTS.get((part, suffix or "weight"), text), adapter or "")


def parameter_key(key: str) -> str:
    """The key with the parameter's own name in it where its ending stands for that."""
    if key.endswith(MODULATION):
        return f"{key.removesuffix(MODULATION)}.modulation.diff"
    return key
