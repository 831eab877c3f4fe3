"""The mask-free CatVTON: 8 channels, garment beside the person, against the published loop."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import latents
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.tryon import glue, load_run, mask_free, saving
from frugal.tests.helpers import tryon as bed


@pytest.fixture(scope="module")
def base():
    return bed.make_unet(0, in_channels=8)


@pytest.fixture(scope="module")
def tuned(base):
    other = bed.make_unet(1, in_channels=8).state_dict()
    unet = bed.make_unet(0, in_channels=8)
    unet.load_state_dict(
        {n: other[n] if ".attn1." in n else t for n, t in base.state_dict().items()}
    )
    return bed.skip_cross_attention(unet)


@pytest.fixture(scope="module")
def patcher(tmp_path_factory, base, tuned):
    root = tmp_path_factory.mktemp("catvton")
    save_file(bed.state(base), root / "pix2pix.safetensors", bed.META)
    save_file(bed.attention_tensors(tuned), root / "attention.safetensors")
    return load_run.load_catvton(
        str(root / "pix2pix.safetensors"), str(root / "attention.safetensors"), "fp32"
    )


def test_forward_equals_diffusers(patcher, tuned):
    x, t = bed.inputs()
    x = x[:, :8]
    want = bed.forward(tuned, x, t)
    assert bed.relative(bed.run(patcher, x, t), want) <= 1e-5
    assert patcher.attachments[REPORT_KEY].notes[0].startswith("mask-free")
    assert patcher.attachments[REPORT_KEY].licence == load_run.WEIGHTS_LICENCE


def test_conditioning_is_beside_scaled_and_half_empty_on_the_negative_side(patcher):
    person, garment, _ = bed.scene(batch=1)
    vae = bed.FakeVAE()
    positive, negative, latent = mask_free.conditioning(person, garment, vae)
    assert latent["samples"].shape == (1, 4, 8, 8) and not latent["samples"].any()
    left, right = bed.SCALE * vae.encode(person), bed.SCALE * vae.encode(garment)
    for side, beside in ((positive, right), (negative, torch.zeros_like(right))):
        conds = patcher.model.extra_conds(
            noise=torch.randn(1, 4, 8, 8), device=torch.device("cpu"), **side[0][1]
        )
        assert torch.allclose(conds["c_concat"].cond, torch.cat([left, beside], 3), atol=1e-6)


@pytest.mark.parametrize("cfg, eta", [(2.5, 1.0), (1.0, 1.0), (2.5, 0.0)])
def test_four_steps_equal_the_published_loop(patcher, tuned, cfg, eta):
    person, garment, _ = bed.scene(batch=2)
    vae = bed.FakeVAE()
    made = mask_free.conditioning(person, garment, vae)
    start, fresh = bed.noises(made[2]["samples"].shape, 4)
    left, right = bed.SCALE * vae.encode(person), bed.SCALE * vae.encode(garment)
    sides = [torch.cat([left, 0 * right], 3), torch.cat([left, right], 3)]
    want = bed.published_loop(tuned, sides, start, fresh, cfg, eta)
    got = bed.native_loop(patcher, made, start, fresh, cfg, eta)
    assert bed.relative(got, want) <= 1e-5
    # Unscaled latents, or the garment below, are other pictures.
    unscaled = bed.published_loop(tuned, [s / bed.SCALE for s in sides], start, fresh, cfg, eta)
    assert bed.relative(unscaled, want) > 1e-2


def test_the_left_half_is_the_person():
    samples = torch.arange(2 * 4 * 8 * 12.0).reshape(2, 4, 8, 12)
    assert torch.equal(latents.person_half(samples, (64, 48), 8), samples[..., :6])
    assert torch.equal(latents.person_half(samples, (32, 96), 8), samples[:, :, :4])
    assert torch.equal(latents.beside(samples, samples)[..., 12:], samples)
    with pytest.raises(FrugalError, match="beside it, of the mask-free model"):
        latents.person_half(samples, (64, 96), 8)


def test_one_person_serves_two_garments_and_sizes_must_agree():
    person, garment, _ = bed.scene(batch=2)
    positive, _, latent = mask_free.conditioning(person[:1], garment, bed.FakeVAE())
    assert latent["samples"].shape[0] == 2
    assert positive[0][1]["concat_latent_image"].shape == (2, 4, 8, 8)
    with pytest.raises(FrugalError, match="differ"):
        mask_free.conditioning(person, garment[:, :32], bed.FakeVAE())


def test_quantised_saved_and_read_back(patcher, tmp_path, tuned):
    path = str(tmp_path / "free.safetensors")
    saving.save_catvton(patcher, path)
    again = load_run.load_catvton(path, None, "fp32", "int8")
    x, t = bed.inputs()
    x = x[:, :8]
    assert 0 < bed.relative(bed.run(again, x, t), bed.forward(tuned, x, t)) < 2.5e-2


def test_conditioning_of_the_other_variant_is_refused(patcher, tmp_path):
    start, fresh = bed.noises((1, 4, 8, 8), 2)
    masked = glue.conditioning(*bed.scene(batch=1), bed.FakeVAE())
    free = mask_free.conditioning(*bed.scene(batch=1)[:2], bed.FakeVAE())

    def refused(match, model, conditioning, noise):
        with pytest.raises(FrugalError, match=match):
            bed.native_loop(model, conditioning, noise, fresh, 1.0, 0.0)

    refused("and a mask; expected no mask", patcher, masked, torch.zeros(1, 4, 16, 4))
    refused("shape .1, 4, 16, 4.", patcher, (*free[:2], masked[2]), torch.zeros(1, 4, 16, 4))
    bare = [[free[0][0][0], {}]]
    refused("has no picture", patcher, (bare, bare, free[2]), start)
    weights = bed.state(bed.skip_cross_attention(bed.make_unet(0)))
    save_file(weights, tmp_path / "masked.safetensors", bed.META)
    other = load_run.load_catvton(str(tmp_path / "masked.safetensors"), None, "fp32")
    refused("a picture and no mask", other, free, start)
