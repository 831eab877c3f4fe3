"""What tests of the try-on nodes share."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch

from frugal.demo.tiny_wan import save
from frugal.nodes.tryon import load_run
from frugal.tests.helpers.builders import tryon_unet, tryon_vae


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """(MODEL in fp32, VAE): tiny and random."""
    root = tmp_path_factory.mktemp("tryon")
    torch.manual_seed(0)
    unet = {name: value.contiguous() for name, value in tryon_unet((32, 64)).state_dict().items()}
    file = save(unet, root / "unet.safetensors", {"num_heads": "4"})
    vae = comfy.utils.load_torch_file(str(tryon_vae(root / "vae.safetensors")))
    return load_run.load_catvton(str(file), None, "fp32"), comfy.sd.VAE(sd=vae)
