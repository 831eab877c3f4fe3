"""Model files of random weights for `gpu`, of real or tiny size, made on the card.

`python bench/gpu_files.py catvton|MODEL TREE MODELS_FOLDER [--file NAME --format FORMAT] [--tiny]`,
a process of its own, so that the card is empty again when the server starts. Matrices are
N(0, 1 / inputs), so activations stay near unit size; quantised layers are made by the pack's own
encoder, in formats that ComfyUI runs by itself too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness

TEXT = {"positive": 4, "negative": 5}
# SD 1.5's blocks with attention, in the order of CatVTON's file: down, up, middle.
CATVTON_WIDTHS = (1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4)


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(name: str, tiny: bool) -> Any:
    """A configuration of `fit.WAN`, or the same kind of model cut down to two layers."""
    from frugal.kernels.memory.fit import WAN

    found = WAN[name]
    return replace(found, dim=256, ffn_dim=512, layers=2) if tiny else found


def random(shape: tuple[int, ...], name: str, make: Any) -> Any:
    """Values for a parameter of this name, float32 on the generator's device."""
    import torch

    noise = torch.randn(shape, generator=make, device=make.device)
    if "modulation" in name:
        return noise / shape[-1] ** 0.5
    if name.endswith("bias"):
        return 0.02 * noise
    if len(shape) > 1 and not name.endswith("gamma"):
        return noise / noise[0].numel() ** 0.5
    return torch.ones_like(noise)


def filled(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """fp16 tensors of these shapes in main memory."""
    import torch

    make = torch.Generator(device()).manual_seed(seed)
    return {name: random(tuple(shape), name, make).half().cpu() for name, shape in shapes.items()}


def wan(path: Path, name: str, target: str, tiny: bool) -> Path:
    """A Wan model; its blocks' layers in `target`, one of the encoder's, the rest fp16."""
    import torch

    from frugal.demo.tiny_wan import save
    from frugal.kernels.checkpoints.wan_shapes import parameters
    from frugal.kernels.formats.codec import encode

    where = device()
    make = torch.Generator(where).manual_seed(1)
    state = {}
    for key, parameter in parameters(config(name, tiny)).items():
        values = random(tuple(parameter.shape), key, make)
        if target != "fp16" and parameter.linear and key.startswith("blocks."):
            layer = key.removesuffix(".weight")
            made = encode(target, values, where, where=f"{path.name}: {layer}")
            state |= {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
        else:
            state[key] = values.half().cpu()
    return save(state, path)


def wan_around(models: Path, tiny: bool) -> None:
    """What a Wan graph needs beside its model: the VAE, and two texts as an encoder leaves them."""
    from frugal.demo.tiny_wan import save, text_embedding, vae_shapes

    save(filled(vae_shapes(8 if tiny else 96), 3), models / "vae" / "wan_2.1_vae.safetensors")
    for name, seed in TEXT.items():
        held = {"embeds": text_embedding(12 if tiny else 512, seed)}
        save(held, models / "text_embeds" / f"{name}.safetensors")


def catvton(models: Path, tiny: bool) -> None:
    """The three files of a try-on graph, under their public names."""
    import comfy.ldm.models.autoencoder
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from frugal.demo.tiny_wan import save

    width = 64 if tiny else 320
    with torch.device("meta"):
        unet = UNetModel(
            image_size=32,
            in_channels=9,
            out_channels=4,
            model_channels=width,
            num_res_blocks=[2, 2, 2, 2],
            channel_mult=(1, 2, 4, 4),
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            transformer_depth_middle=1,
            context_dim=768,
            operations=comfy.ops.disable_weight_init,
        )
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(
            embed_dim=4,
            ddconfig={
                "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3,
                "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
                "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
            },
        )  # fmt: skip
    base = {f"model.diffusion_model.{k}": tuple(v.shape) for k, v in unet.state_dict().items()}
    save(filled(base, 6), models / "checkpoints" / "sd-v1-5-inpainting.safetensors")
    attention = {}
    for at, times in enumerate(CATVTON_WIDTHS):
        for part in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"):
            attention[f"{8 * at}.{part}"] = (times * width, times * width)
        attention[f"{8 * at}.to_out.0.bias"] = (times * width,)
    save(filled(attention, 7), models / "CatVTON" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    save(filled(shapes, 8), models / "vae" / "vae-ft-mse-840000-ema-pruned.safetensors")


def picture(path: Path, width: int, height: int, hole: bool) -> None:
    """Noise as a PNG, its middle transparent where a mask is wanted."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(9).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    if hole:
        pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4, 3] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if hole else pixels[..., :3]).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tree", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--file")
    parser.add_argument("--format")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.model == "catvton":
        # For its modules alone: the files are made on the card without it.
        harness.enter(given.tree)
        catvton(given.models, given.tiny)
        return
    harness.enter("none")
    from frugal.kernels.quantize.compiled import follow_comfyui

    follow_comfyui()
    wan_around(given.models, given.tiny)
    path = given.models / "diffusion_models" / given.file
    wan(path, given.model, given.format, given.tiny)


if __name__ == "__main__":
    main()
