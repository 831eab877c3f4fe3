"""Write the trained demo models where ComfyUI looks: `python -m demo.export codec.pt unet.pt`.

Three files under demo/models, in the arrangement of the real ones: a 9-channel base UNet, CatVTON's
attention file (integer prefixes, stride 8) and a codec for `VAELoader`. The base's self-attention
is zeroed, so that without the attention file nothing is dressed: a loader that drops it cannot pass
unnoticed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from .codec import Codec
from .layout import LABEL, MODELS
from .tiny_wan import save
from .tryon_net import HEADS, build

TAILS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")


def attention_blocks(net) -> list[str]:
    """Names of the self-attention modules in CatVTON's order: down, up, mid."""
    return [name for name, _ in net.named_modules() if name.endswith(".attn1")]


def split(net) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base state dict (diffusers names, no attn2, zero attn1) and attention state dict (0., 8.,
    16., ...).
    """
    state = {
        k: v.detach().half().contiguous() for k, v in net.state_dict().items() if ".attn2." not in k
    }
    attention = {}
    for number, block in enumerate(attention_blocks(net)):
        for tail in TAILS:
            attention[f"{8 * number}.{tail}"] = state[f"{block}.{tail}"]
            state[f"{block}.{tail}"] = torch.zeros_like(state[f"{block}.{tail}"])
    return state, attention


def read(models: Path = MODELS):
    """(Codec, UNet2DConditionModel) from the exported files, attention put back by its number."""
    attention = load_file(models / "CatVTON" / "frugal_demo_tryon_attention.safetensors")
    codec, net = Codec(), build()
    stored = load_file(models / "vae" / "frugal_demo_codec.safetensors")
    codec.load_state_dict({k: v.float() for k, v in stored.items() if k.startswith("taesd_")})
    state = load_file(models / "diffusion_models" / "frugal_demo_tryon_base.safetensors")
    for number, block in enumerate(attention_blocks(net)):
        state |= {f"{block}.{tail}": attention[f"{8 * number}.{tail}"] for tail in TAILS}
    missing, unexpected = net.load_state_dict(
        {k: v.float() for k, v in state.items()}, strict=False
    )
    if unexpected or any(".attn2." not in key for key in missing):
        raise ValueError(f"the demo models do not fit the net: {unexpected or missing}")
    return codec.eval(), net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codec", type=Path)
    parser.add_argument("unet", type=Path)
    args = parser.parse_args()
    codec, net = Codec(), build()
    codec.load_state_dict(torch.load(args.codec, weights_only=True))
    net.load_state_dict(torch.load(args.unet, weights_only=True))
    base, attention = split(net)
    licence = {"frugal.licence": "Apache-2.0", "frugal.label": LABEL}
    facts = {"num_heads": str(HEADS), "modelspec.prediction_type": "v", **licence}
    for state, path, metadata in (
        (base, MODELS / "diffusion_models" / "frugal_demo_tryon_base.safetensors", facts),
        (attention, MODELS / "CatVTON" / "frugal_demo_tryon_attention.safetensors", licence),
        (codec.export(), MODELS / "vae" / "frugal_demo_codec.safetensors", licence),
    ):
        save(state, path, metadata)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
