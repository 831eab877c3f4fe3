"""Models and modules built on Wan that the loader cannot run: each is named, with what to do."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers import wan as bed

SOURCE = bed.weights()
ONE = torch.zeros(4, 4)
BLOCK = "blocks.0."
INFINITE = {"audio_proj.proj1.weight": ONE, f"{BLOCK}audio_cross_attn.q_linear.weight": ONE}
REMOVER = {
    name: tensor
    for name, tensor in SOURCE.items()
    if "text_embedding" not in name and "cross_attn" not in name and "norm3" not in name
}
# label -> (tensors, words of the message)
FILES = {
    "InfiniteTalk, module": (INFINITE, "Load Model Patch.* InfiniteTalk .* module"),
    "InfiniteTalk, merged": (
        SOURCE | INFINITE,
        "module by itself with Load Model Patch.*merged in",
    ),
    "Uni3C": (
        {"controlnet_patch_embedding.weight": ONE, "controlnet_blocks.0.ffn.0.weight": ONE},
        "Load Model Patch.* a Uni3C module",
    ),
    "SkyReels DF": (
        SOURCE | {"fps_embedding.weight": ONE, "fps_projection.0.weight": ONE},
        "without DF.*SkyReels-V2 diffusion forcing",
    ),
    "FastWan VSA": (
        SOURCE | {f"{BLOCK}self_attn.to_gate_compress.weight": ONE},
        "FullAttn.*video sparse attention",
    ),
    "FastWan VSA, diffusers": (
        {bed.to_diffusers(k): v for k, v in SOURCE.items()}
        | {f"{BLOCK}to_gate_compress.bias": ONE},
        "video sparse attention",
    ),
    "ReCamMaster": (
        SOURCE | {f"{BLOCK}cam_encoder.weight": ONE, f"{BLOCK}projector.weight": ONE},
        "a ReCamMaster model",
    ),
    "MiniMax-Remover": (REMOVER, "without text conditioning, as MiniMax-Remover"),
    "MiniMax-Remover, diffusers": (
        {bed.to_diffusers(k): v for k, v in REMOVER.items()},
        "without text conditioning, as MiniMax-Remover",
    ),
}


@pytest.mark.parametrize("label", FILES)
def test_named_and_sent_where_it_works(label, tmp_path):
    tensors, words = FILES[label]
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    source = open_source(bed.write(tmp_path / "wan.safetensors", held))
    with pytest.raises(FrugalError, match=words) as caught:
        plan_wan(source.name, source.tensors, source.metadata, source.value)
    assert str(caught.value).isascii() and "Load Diffusion Model" not in str(caught.value)


@pytest.mark.parametrize("config", [bed.T2V, bed.I2V, bed.VACE])
def test_wan_itself_is_none_of_them(config, tmp_path):
    source = open_source(bed.write(tmp_path / "wan.safetensors", bed.weights(config)))
    assert plan_wan(source.name, source.tensors, source.metadata, source.value).config == config
