"""Presets do what the named projects do: their noise levels, blocks and context; a context that is
recomputed before every block equals forwards of all frames at once.
"""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.causal.presets import CAUSAL_PRESETS, FOUR
from frugal.kernels.errors import FrugalError
from frugal.nodes.causal import model_run, video_run
from frugal.nodes.causal.sampler_run import Job
from frugal.nodes.causal.video_run import Settings, make_video
from frugal.tests.helpers import causal as videos


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return videos.load(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return videos.stock(videos.load(tmp_path_factory.mktemp("stock")))


def made(model, frames, settings, **more):
    conds = [[[videos.prompt_of(seed), {}]] for seed in (5, 6)]
    latent = {"samples": torch.zeros(1, 16, frames, 4, 4)}
    with torch.inference_mode():
        return make_video(model, *conds, latent, settings, **more)


@pytest.mark.parametrize(("block", "cfg"), [(2, 1.0), (1, 3.0)])
def test_a_recomputed_context_equals_the_masked_forward(plain, network, block, cfg):
    """All frames of the window in one pass, as far as a block goes, however far apart in time."""
    options = dict(window=3, sink=1, relative=True)
    reference, wanted = videos.Reference(network, **options), []
    for first in range(0, 8, block):
        reference.forget_the_unseen(first, block)
        known = reference.known
        for i, frame in enumerate(known):
            frame.block = known[i // block * block].number
        wanted.append(reference.make(block, block, cfg=cfg, first=first))
    model = videos.causal(plain, **options)
    job = Job(recompute=True)
    found = videos.make(model, 8, block, job, cfg=cfg)
    assert videos.far(found, torch.cat(wanted, dim=2)) < 1e-5
    assert videos.far(found, videos.make(model, 8, block, cfg=cfg)) > 1e-4
    # Each block but the first: the context in blocks of its own, then the steps; no pass after it.
    context = {2: (1, 1, 1), 1: (1, 2, 3, 3, 3, 3, 3)}[block]
    if block == 2:
        assert job.calls == 2 * 4 + sum(context)


def test_recompute_goes_on_from_a_session_as_in_one_run(plain):
    model = videos.causal(plain, window=3, sink=1, relative=True)
    whole = videos.make(model, 8, job=Job(recompute=True))
    job = Job(recompute=True, keep=True)
    first = videos.make(model, 4, job=job)
    second = videos.make(model, 4, job=Job(cache=job.cache.fork(), recompute=True), first=4)
    assert torch.equal(torch.cat([first, second], dim=2), whole)


@pytest.mark.parametrize("at", range(4))
def test_a_cancel_while_the_context_is_computed_leaves_no_page(plain, at):
    from comfy.patcher_extension import WrappersMP

    model, calls = videos.causal(plain, window=3, sink=1, relative=True), []
    job = Job(recompute=True, keep=True)
    videos.make(model, 4, job=job)
    pool = job.cache.pool
    before, branch = pool.used_bytes, job.cache.fork()

    def stop(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    stopped = model.clone()
    stopped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", stop)
    later = Job(cache=branch, recompute=True)
    with pytest.raises(KeyboardInterrupt):
        videos.make(stopped, 4, job=later, first=4)
    later.cache.release()
    assert pool.used_bytes == before


def test_apart_frames_have_no_absolute_place(plain):
    job = Job(keep=True)
    videos.make(videos.causal(plain), 4, job=job)
    with pytest.raises(ValueError, match="at their own numbers"):
        job.cache.start_block(2, [0, 5])
    # Absolute positions: the blocks stay as they were made.
    assert [len(group) for group in job.cache.blocks(3)] == [2, 2]


@pytest.mark.parametrize("name", list(CAUSAL_PRESETS))
def test_presets(plain, name, monkeypatch):
    preset = CAUSAL_PRESETS[name]
    assert preset.levels[0] == 1 and preset.levels[-1] == 0
    assert sorted(preset.levels, reverse=True) == list(preset.levels)
    seen = []
    run = video_run.causal_sampler.sample_causal

    def watch(model, x, sigmas, extra_args=None, callback=None, disable=None, **more):
        options = extra_args["model_options"]["transformer_options"][model_run.OPTIONS]
        job = more["job"]
        seen.append((options, tuple(sigmas.tolist()), more["frames_per_block"], job.recompute))
        return run(model, x, sigmas, extra_args, callback, disable, **more)

    monkeypatch.setattr(video_run.causal_sampler, "sample_causal", watch)
    model = videos.causal(plain, window=4)
    frames = 3 * preset.block
    settings = Settings(9, 20, 1.0, "karras", 2, preset=name)
    latent, _, report = made(model, frames, settings)
    ((options, sigmas, block, recompute),) = seen
    assert (options.window, options.sink) == (preset.window, preset.sink) and options.relative
    assert sigmas == pytest.approx(preset.levels, abs=1e-6)
    assert (block, recompute) == (preset.block, preset.recompute)
    calls = 3 * (len(preset.levels) - 1) + 2 + max(0, len(preset.first) - len(preset.levels))
    assert f"{frames} latent frames in {calls} model calls" in report
    assert f"{name}: noise levels 1" in report
    # The model that was given is as it was, and a run without a preset follows its inputs.
    assert model.model_options["transformer_options"][model_run.OPTIONS].window == 4
    assert not torch.equal(
        latent["samples"], made(model, frames, Settings(9, 2, 1.0, "simple", 2))[0]["samples"]
    )


def test_four_levels_are_the_simple_schedule_at_shift_5(plain):
    model = videos.causal(plain, window=21, relative=True)
    by_hand = made(model, 6, Settings(9, 4, 1.0, "simple", 3))[0]["samples"]
    preset = made(model, 6, Settings(9, 4, 1.0, "simple", 3, preset="Self-Forcing"))[0]["samples"]
    assert pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0)) == FOUR
    assert videos.far(preset, by_hand) < 1e-5


def test_a_session_of_other_positions_is_refused(plain):
    model = videos.causal(plain, window=4)
    _, session, _ = made(model, 3, Settings(9, 1, 1.0, "simple", 3, keep=True))
    with pytest.raises(FrugalError, match="relative True for a video whose cache"):
        made(model, 3, Settings(9, 1, 1.0, "simple", 3, preset="LongLive"), session=session)
