"""A latent, a text encoder or a VAE of another model is named before the model fails on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes.sampling import matching, sampler_run
from frugal.tests.helpers import sampling as sampling_bed

pytestmark = pytest.mark.comfy
WORDS = torch.zeros(1, 3, 4096)


def model(**more):
    form = SimpleNamespace(latent_channels=16)
    inner = SimpleNamespace(**({"text_dim": 4096} | more))
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=inner, latent_format=form))


def latent(channels=16, value=1.0):
    return {"samples": torch.full((1, channels, 2, 4, 4), value)}


def prompt(words=WORDS, **extra):
    return [[words, extra]]


@pytest.mark.parametrize("channels", [4, 48])
def test_a_latent_of_another_vae(channels):
    with pytest.raises(FrugalError, match=rf"Wan 2.1 VAE.*a latent of {channels} channels"):
        matching.check(model(), (prompt(), prompt()), latent(channels))
    matching.check(model(), (prompt(), prompt()), latent(channels, 0.0))


@pytest.mark.parametrize("place", [0, 1])
def test_words_of_another_encoder(place):
    prompts = [prompt(), prompt()]
    prompts[place] = prompt(torch.zeros(1, 77, 768))
    with pytest.raises(FrugalError, match=r"umT5-XXL.*(positive|negative) prompt has 768 values"):
        matching.check(model(), tuple(prompts), latent())


@pytest.mark.parametrize("channels", [4, 48])
def test_a_start_image_of_another_vae(channels):
    image = torch.zeros(1, channels, 2, 4, 4)
    with pytest.raises(FrugalError, match=rf"start image is encoded.*has {channels} channels"):
        matching.check(model(), (prompt(concat_latent_image=image), prompt()), latent())


@pytest.mark.parametrize("channels", [16, 32])
def test_what_belongs_together_passes(channels):
    image = torch.zeros(1, channels, 2, 4, 4)
    matching.check(model(), (prompt(concat_latent_image=image), prompt()), latent())


def test_other_models_are_left_alone():
    matching.check(model(text_dim=None), (prompt(torch.zeros(1, 2, 8)), prompt()), latent(4))


def test_the_sampler_asks_first(wan, prompts):
    job = sampler_run.Job(7, 2, 1.0, "euler", "simple", 1.0)
    wrong = {"samples": torch.ones_like(sampling_bed.latent_of())[:, :4]}
    with pytest.raises(FrugalError, match="a latent of 4 channels"):
        sampler_run.run(wan, *prompts, wrong, job)
