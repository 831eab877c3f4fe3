"""Streamed VAE halves equal ComfyUI's own encode and decode to the bit."""

from __future__ import annotations

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import pytest
import torch

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.nodes.wan import vae_decode, vae_encode, vae_stream

SIDE = 4


def wan_vae(dtype: torch.dtype = torch.float32, dim: int = 8):
    return comfy.sd.VAE(sd=fill(vae_shapes(dim), 3, torch.float32), dtype=dtype)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def vae(request):
    made = wan_vae(getattr(torch, request.param))
    assert made.vae_dtype == getattr(torch, request.param)
    return made


def latent(frames: int, side: int = SIDE, batch: int = 1, channels: int = 16) -> dict:
    make = torch.Generator().manual_seed(frames)
    return {"samples": torch.randn(batch, channels, frames, side, side + 2, generator=make)}


def clip(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    make = torch.Generator().manual_seed(frames)
    return torch.rand(frames, height, width, 3, generator=make)


def whole(vae, given: dict) -> torch.Tensor:
    with torch.inference_mode():
        images = vae.decode(given["samples"])
    return images.reshape(-1, *images.shape[-3:])


def decode(vae, given, tile=0, overlap=64):
    with torch.inference_mode():
        return vae_decode.to_images(vae, given, tile, overlap)


def encode(vae, images=None, video=None, tile=0, overlap=64):
    with torch.inference_mode():
        given, report = vae_encode.encode(vae, images, video, tile, overlap)
    return given["samples"], report


@pytest.mark.parametrize("frames", [*range(1, 10), 40, 41])
def test_decode_equals_the_whole(vae, frames):
    given = latent(frames)
    images, _ = decode(vae, given)
    expected = whole(vae, given)
    assert images.shape[0] == 4 * frames - 3 and images.dtype == expected.dtype
    assert torch.equal(images, expected)
