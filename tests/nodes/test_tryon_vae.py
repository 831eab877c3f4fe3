"""The VAE of any width against diffusers' AutoencoderKL and against core's own loader."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from frugal.kernels.errors import FrugalError
from frugal.nodes.tryon import loading


def make_vae(widths, layers, seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=32,
    ).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return vae.requires_grad_(False)


def save(vae, path):
    save_file({n: t.contiguous() for n, t in vae.state_dict().items()}, path)
    return str(path)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "widths, layers", [((32, 32, 64, 128), 1), ((32, 64, 64, 64), 2), ((32, 64, 128), 2)]
)
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(tmp_path, widths, layers):
    reference = make_vae(widths, layers)
    vae, report = loading.load_vae(save(reference, tmp_path / "vae.safetensors"))
    factor = 2 ** (len(widths) - 1)
    pixels = torch.rand(2, 5 * factor, 4 * factor, 3)
    encoded = vae.encode(pixels)
    mean = reference.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean
    assert encoded.shape == mean.shape == (2, 4, 5, 4)
    assert relative(encoded, mean) <= 1e-5
    picture = (reference.decode(0.1 * mean).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    decoded = vae.decode(0.1 * mean)
    assert decoded.shape == pixels.shape and relative(decoded, picture) <= 1e-5
    assert picture.std() > 0.02 and str(widths[-1]) in report.text()
    assert vae.spacial_compression_encode() == factor


def test_the_standard_depth_gives_what_the_stock_loader_gives(tmp_path):
    """The stock reader knows 128, 256, 512, 512; a random one is enough to compare bit for bit."""
    path = save(make_vae((128, 256, 512, 512), 2), tmp_path / "vae.safetensors")
    vae, _ = loading.load_vae(path)
    stock = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path))
    ours, theirs = vae.first_stage_model.state_dict(), stock.first_stage_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pixels = torch.rand(1, 16, 16, 3)
    assert torch.equal(vae.encode(pixels), stock.encode(pixels))
    assert torch.equal(vae.decode(torch.ones(1, 4, 2, 2)), stock.decode(torch.ones(1, 4, 2, 2)))
    for name in ("downscale_ratio", "upscale_ratio", "latent_channels", "vae_dtype"):
        assert getattr(vae, name) == getattr(stock, name)


def test_an_incomplete_file_is_refused(tmp_path):
    vae = make_vae((32, 32, 64, 128), 1)
    tensors = dict(vae.state_dict())
    del tensors["decoder.mid_block.attentions.0.to_q.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(FrugalError, match=r"lacks 1 tensors .'decoder.mid.attn_1.q.bias"):
        loading.load_vae(str(tmp_path / "vae.safetensors"))


def test_reload_factory(tmp_path):
    vae, _ = loading.load_vae(save(make_vae((32, 32, 64, 128), 1), tmp_path / "vae.safetensors"))
    if getattr(vae.patcher, "cached_patcher_init", None) is None:
        pytest.skip("this ComfyUI has no reload factories")
    make, given = vae.patcher.cached_patcher_init
    again, ours = make(*given).model.state_dict(), vae.first_stage_model.state_dict()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
