"""The step cache in ComfyUI's own samplers: counts, exactness when off, and no traces."""

from __future__ import annotations

import gc

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.errors import FrugalError
from frugal.kernels.sampling.step_cache import StepCache
from frugal.nodes.sampling import guidance_range_run, step_cache_run
from frugal.nodes.sampling.step_cache import FrugalStepCache
from frugal.tests.helpers import flows, sampling

pytestmark = pytest.mark.card

STEPS = 20
OPEN = step_cache_run.Options(threshold=0.3, start=0.0, end=1.0, max_skips=3)
OFF = step_cache_run.Options(threshold=0.0)


def with_cache(model, options=OPEN):
    reports = []
    return step_cache_run.apply(model, options, reports.append), reports


def run(model, prompts, options=OPEN, **more):
    """(latent, report, conditions computed by the network)."""
    counting, calls = sampling.counted(model)
    cached, reports = with_cache(counting, options)
    result = sampling.sample(cached, prompts, more.pop("steps", STEPS), **more)
    assert len(reports) == 1
    return result, reports[0], sum(calls)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m", "uni_pc"])
def test_counts_and_error_by_sampler(smooth_wan, prompts, sampler):
    full, off, all_calls = run(smooth_wan, prompts, OFF, sampler=sampler)
    assert torch.equal(full, sampling.sample(smooth_wan, prompts, STEPS, sampler))
    result, report, calls = run(smooth_wan, prompts, sampler=sampler)
    assert (off.skipped, 2 * off.computed) == (0, all_calls)
    assert 2 * report.computed == calls
    assert report.computed + report.skipped == off.computed
    assert report.skipped > STEPS / 4
    assert flows.relative(result, full) < 0.2


def test_a_network_that_no_line_follows_is_computed_in_full(wan, prompts):
    result, report, calls = run(wan, prompts, steps=8)
    assert torch.equal(result, sampling.sample(wan, prompts, 8))
    assert (report.skipped, calls) == (0, 16)
    assert min(report.checked) > OPEN.threshold


def test_added_noise_turns_the_cache_down_by_itself(smooth_wan, prompts):
    _, smooth, _ = run(smooth_wan, prompts)
    _, noisy, calls = run(smooth_wan, prompts, sampler="euler_ancestral")
    assert noisy.skipped < smooth.skipped
    assert calls == 2 * noisy.computed


def test_the_samplers_latent_is_not_touched(smooth_wan, prompts):
    """In float32 nothing is copied on the way to the network, so a change in place would show."""
    seen, model = [], smooth_wan.clone()

    def outside(executor, *args, **kwargs):
        x, before = args[0], args[0].clone()
        outputs = [executor(*args, **kwargs)]
        seen.append(torch.equal(x, before))
        shared = x.untyped_storage().data_ptr()
        assert all(out.untyped_storage().data_ptr() != shared for out in outputs)
        return outputs[0]

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.outside", outside)
    _, report, _ = run(model, prompts)
    assert report.skipped > 0
    assert seen == [True] * STEPS


def test_context_windows_are_conditions_of_their_own(smooth_wan, prompts):
    from comfy.context_windows import (
        ContextFuseMethods,
        ContextSchedules,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    handler = IndexListContextHandler(
        context_schedule=get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
        fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
        context_length=4, context_overlap=2, dim=2,
    )  # fmt: skip
    model = smooth_wan.clone()
    model.model_options["context_handler"] = handler
    latent = sampling.latent_of(8)
    full, off, _ = run(model, prompts, OFF, latent=latent)
    result, report, calls = run(model, prompts, latent=latent)
    assert off.computed == STEPS
    assert report.computed + report.skipped == STEPS
    assert calls == 3 * 2 * report.computed
    assert report.skipped > STEPS / 6
    assert flows.relative(result, full) < 0.2


def test_guidance_range_keeps_the_history_of_the_other_prompt(smooth_wan, prompts):
    model = guidance_range_run.apply(smooth_wan, 0.0, 0.5)
    full, off, all_calls = run(model, prompts, OFF)
    assert 1.3 * STEPS < all_calls < 1.7 * STEPS
    assert off.computed == STEPS
    result, report, _ = run(model, prompts)
    assert report.skipped > STEPS / 4
    assert flows.relative(result, full) < 0.2


def test_a_prompt_that_ends_midway_is_not_predicted(smooth_wan, prompts):
    """With start and end percents the same list of prompts means something else later."""
    first, second = (prompts[0][0][0], prompts[1][0][0])
    scheduled = [
        [[first, {"end_percent": 0.5}], [second, {"start_percent": 0.5}]],
        prompts[1],
    ]
    full, _, _ = run(smooth_wan, scheduled, OFF)
    result, report, calls = run(smooth_wan, scheduled)
    assert report.skipped > 0
    assert calls >= 2 * report.computed
    assert flows.relative(result, full) < 0.2


def fails_after(count, error):
    def callback(step, *_):
        if step == count:
            raise error

    return callback


@pytest.mark.parametrize("kind", ["error", "cancel"])
def test_a_run_cut_short_leaves_nothing(smooth_wan, prompts, kind):
    from comfy.model_management import InterruptProcessingException

    error = InterruptProcessingException() if kind == "cancel" else RuntimeError("broken")
    cached, reports = with_cache(smooth_wan)
    clean, _, _ = run(smooth_wan, prompts)
    before = str(cached.model_options)
    with pytest.raises(type(error)):
        sampling.sample(cached, prompts, STEPS, callback=fails_after(15, error))
    error.__traceback__ = None
    gc.collect()
    caches = [each for each in gc.get_objects() if isinstance(each, StepCache)]
    assert not [each for each in caches if each._tracks]
    assert reports == []
    assert str(cached.model_options) == before
    assert torch.equal(sampling.sample(cached, prompts, STEPS), clean)


def test_clones_and_weights_stay_as_they_were(wan, prompts):
    weights = {name: value.clone() for name, value in wan.model.state_dict().items()}
    plain = sampling.sample(wan, prompts, 3)
    cached, _ = with_cache(wan)
    sampling.sample(cached, prompts, 6)
    assert not step_cache_run.present(wan)
    assert torch.equal(sampling.sample(wan, prompts, 3), plain)
    after = wan.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in after.items())


def test_two_runs_of_one_model_do_not_share_state(smooth_wan, prompts):
    cached, reports = with_cache(smooth_wan)
    first = sampling.sample(cached, prompts, STEPS)
    wider = sampling.latent_of(3, batch=2)
    sampling.sample(cached, prompts, STEPS, latent=wider)
    assert torch.equal(sampling.sample(cached, prompts, STEPS), first)
    assert reports[0] == reports[2]


def test_applied_twice_is_applied_once(smooth_wan, prompts):
    once, _ = with_cache(smooth_wan)
    twice, reports = with_cache(once)
    sampling.sample(twice, prompts, STEPS)
    assert len(reports) == 1


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_stands_aside_for_another_cache(smooth_wan, prompts, name):
    from comfy_extras import nodes_easycache

    other = getattr(nodes_easycache, name).execute(smooth_wan, 0.2, 0.15, 0.95, False).args[0]
    _, report, _ = run(other, prompts)
    assert report.skipped == 0
    assert "this step cache is inactive" in report.text()


@pytest.mark.parametrize("ours", [False, True])
def test_a_causal_model_is_left_alone(smooth_wan, prompts, monkeypatch, ours):
    causal, network = smooth_wan.clone(), smooth_wan.model.diffusion_model
    if ours:
        causal.model_options["transformer_options"]["frugal.causal"] = object()
    else:
        monkeypatch.setattr(network, "init_kv_caches", lambda: None, raising=False)
    _, report, calls = run(causal, prompts)
    assert (report.skipped, calls) == (0, 2 * STEPS)
    assert "causal" in report.notes[0]


def test_works_around_a_compiled_model(smooth_wan, prompts):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = smooth_wan.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    result, report, calls = run(compiled, prompts)
    want, plain, _ = run(smooth_wan, prompts)
    assert report.skipped == plain.skipped > 0
    assert calls == 2 * report.computed
    assert flows.relative(result, want) < 1e-5


def test_says_when_it_cannot_help(smooth_wan, prompts):
    _, report, _ = run(smooth_wan, prompts, steps=4)
    assert "4 steps" in report.notes[0]
    _, report, _ = run(smooth_wan, prompts, OFF)
    assert "never skips" in report.notes[0]


def test_the_node_gives_a_model_and_refuses_an_empty_range(smooth_wan):
    node = FrugalStepCache.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    shown = node.execute(smooth_wan, 0.05, 0.15, 0.95, 3)
    assert step_cache_run.present(shown.args[0])
    with pytest.raises(FrugalError, match=r"start 0\.9 and end 0\.2"):
        node.execute(smooth_wan, 0.05, 0.9, 0.2, 3)
