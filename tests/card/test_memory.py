"""Memory plans, running out of memory, VAEs and their bytes on the simulated card."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.demo.tiny_wan import fill, save, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.nodes.memory import memory_plan_run, meta_models
from frugal.nodes.vae import decode_run
from frugal.tests.card import modes
from frugal.tests.card.bounds import BRAIN, HALF

LARGE = (1, 16, 5, 16, 16)
card_only = pytest.mark.skipif(not modes.ON_CARD, reason="the CPU's memory is not limited")


def planned(model, shape=(1, 16, 2, 8, 8), budget=0.0, limit=False):
    """(model with a plan in force, plan, peaks, job)."""
    job = memory_plan_run.job_of({"samples": torch.zeros(shape)}, 0, 0, 0, 1, True)
    plan, peaks = memory_plan_run.plan_of(model, job, budget)
    return memory_plan_run.apply(model, plan, peaks, limit, None), plan, peaks, job


@pytest.fixture
def wan(bench, layouts):
    return bench.load(layouts["bf16"]())


@pytest.fixture
def vae(bench):
    path = save(fill(vae_shapes(), 3), bench.folder / "vae.safetensors")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture
def peak():
    """(wrapper that goes around forwards, {"bytes": their largest peak})."""
    from frugal.tests.card.simulated_cuda import card

    seen = {"bytes": 0}

    def wrapper(executor, *args, **kwargs):
        size, result = card.peak_of(lambda: executor(*args, **kwargs))
        seen["bytes"] = max(seen["bytes"], size)
        return result

    return wrapper, seen


def test_plan(bench, wan, same_as_cpu):
    made = planned(wan)[0]
    plain = bench.sample(made)
    small = planned(wan, budget=0.03, limit=True)[0]
    same_as_cpu([plain, bench.sample(small), bench.sample(wan)], HALF)


def bounded(model, most=40):
    """A clone whose forwards may be tried `most` times; a plan has far fewer ways to go on."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        assert len(calls) <= most, "it is tried again and again"
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.bounded", wrapper)
    return clone


@card_only
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_out_of_memory_ends(bench, wan, peak, share):
    """A forward that gets less than it asks for goes on with less, or is refused: it ends."""
    from frugal.tests.card.simulated_cuda import card

    latent = torch.zeros(LARGE)
    made = planned(wan, LARGE)[0]
    whole = bench.sample(made, latent=latent)
    wrapper, seen = peak
    watched = made.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.peak", wrapper)
    bench.sample(watched, latent=latent)
    limited = bounded(made)
    with card.memory_limit(card.device.allocated() + int(share * seen["bytes"])):
        try:
            off = bench.sample(limited, latent=latent) - whole
            assert float(off.norm() / whole.norm()) < HALF
        except (FrugalError, torch.OutOfMemoryError) as error:
            assert "memory" in str(error) or "no room for a forward" in str(error)


@card_only
@pytest.mark.parametrize("side", [16, 32])
def test_traced_peak_covers_the_counted_one(bench, wan, peak, side):
    shape = (1, 16, 5, side, side)
    _, plan, peaks, job = planned(wan, shape)
    wrapper, seen = peak
    watched = wan.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.peak", wrapper)
    bench.sample(watched, latent=torch.zeros(shape))
    traced = peaks.of_job(job, plan.memory_options)
    # Flash attention of the simulated card writes scores, which a real one does not.
    assert 0.3 * seen["bytes"] < traced < 3 * seen["bytes"]


def test_plan_of_a_vae_that_has_run(vae, same_as_cpu):
    """A plan traces a copy of the VAE; nothing of the original may go with the copy."""
    latent = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        before = vae.decode(latent)
        meta_models.decoded(vae, (2, 8, 8))
        after = vae.decode(latent)
        meta_models.decoded(vae, (2, 8, 8))
        again = vae.decode(latent)
    assert torch.equal(before, after) and torch.equal(before, again)
    same_as_cpu([before], BRAIN)


def test_decode_in_pieces(vae, same_as_cpu):
    latent = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        whole = decode_run.to_images(vae, {"samples": latent}, 0, 0)[0]
        tiled = decode_run.to_images(vae, {"samples": latent}, 64, 16)[0]
    same_as_cpu([whole, tiled], BRAIN)
