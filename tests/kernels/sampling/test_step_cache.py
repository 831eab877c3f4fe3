"""The step cache against a flow whose velocity is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from frugal.kernels.sampling.forecast import VelocityForecast
from frugal.kernels.sampling.step_cache import StepCache, StepCacheSettings
from frugal.kernels.sampling.step_report import advice
from frugal.tests.helpers.flows import (
    EasyCacheRule,
    MixtureFlow,
    at_calls,
    euler,
    heun,
    levels,
    percent,
    relative,
)

STEPS, START, END = 50, percent(0.15), percent(0.95)


def cached(flow, cache, key="prompt"):
    def denoise(x, t):
        return cache.evaluate([key], x, t, lambda: [flow(x, t)])[0]

    return denoise


def ours(flow, threshold, max_skips=3, sampler=euler):
    cache = StepCache(StepCacheSettings(threshold, START, END, max_skips, tuple(levels(STEPS))))
    flow.calls = 0
    result = sampler(cached(flow, cache), flow.noise, levels(STEPS))
    return cache.report(), result


def compare(flow, calls, max_skips):
    """Relative error against all steps: of this cache, of EasyCache's rule and of fewer steps."""
    full = euler(flow, flow.noise, levels(STEPS))

    def easy(threshold):
        flow.calls = 0
        result = euler(EasyCacheRule(flow, threshold, START, END), flow.noise, levels(STEPS))
        return flow.calls, result

    def own(threshold):
        report, result = ours(flow, threshold, max_skips)
        assert report.computed == flow.calls
        return flow.calls, result

    (own_calls, mine), (easy_calls, rule) = at_calls(own, calls, 1.0), at_calls(easy, calls, 3.0)
    assert own_calls <= calls == easy_calls
    uniform = euler(flow, flow.noise, levels(calls))
    return [relative(result, full) for result in (mine, rule, uniform)]


@pytest.mark.parametrize(("calls", "max_skips", "share"), [(26, 3, 0.25), (19, 5, 0.5)])
def test_error_at_equal_calls(calls, max_skips, share):
    """Median of eight flows: where two modes are equally near, any error can flip a sample. share:
    of the error of EasyCache's rule; the fewer calls, the less a forecast is worth.
    """
    found = torch.tensor([compare(MixtureFlow(seed), calls, max_skips) for seed in range(8)])
    mine, rule, uniform = found.median(0).values.tolist()
    assert mine <= share * rule
    assert mine <= 0.3 * uniform


def test_stays_near_the_true_solution():
    """Not only near its own full run: near the ODE's solution, as near as that run."""
    flow = MixtureFlow(0)
    truth = heun(flow, flow.noise, levels(300))
    full = relative(euler(flow, flow.noise, levels(STEPS)), truth)
    _, result = ours(flow, 0.02)
    assert relative(result, truth) < 1.05 * full


def test_the_default_cap_still_beats_fewer_steps():
    flow = MixtureFlow(0)
    full = euler(flow, flow.noise, levels(STEPS))
    report, result = ours(flow, 0.05, max_skips=3)
    assert report.computed < 30
    uniform = euler(flow, flow.noise, levels(report.computed))
    assert relative(result, full) < 0.3 * relative(uniform, full)


def test_its_own_error_estimate_is_of_the_true_size():
    """Expected errors of skipped calls against the flow itself at the same points."""
    flow, expected, true = MixtureFlow(2), [], []
    cache = StepCache(StepCacheSettings(0.05, START, END, 3))

    def denoise(x, t):
        before = cache.report().skipped
        out = cache.evaluate([0], x, t, lambda: [flow(x, t)])[0]
        if cache.report().skipped > before:
            velocity = (x - flow(x, t)) / t
            wrong = ((x - out) / t - velocity).norm(dim=1) / velocity.norm(dim=1)
            true.append(float(wrong.max()))
            expected.append(cache.report().expected[-1])
        return out

    euler(denoise, flow.noise, levels(STEPS))
    assert len(true) > 15
    ratio = math.exp(sum(math.log(e / t) for e, t in zip(expected, true, strict=True)) / len(true))
    assert 0.5 < ratio < 3


@pytest.mark.parametrize("sampler", [euler, heun])
def test_threshold_zero_changes_nothing(sampler):
    flow = MixtureFlow(0)
    full = sampler(flow, flow.noise, levels(STEPS))
    made = flow.calls
    report, result = ours(flow, 0.0, sampler=sampler)
    assert torch.equal(result, full)
    assert (report.computed, report.skipped, flow.calls) == (made, 0, made)


def test_two_evaluations_per_step_are_two_histories():
    """heun looks at each level twice; skips are counted by level and the result holds."""
    flow = MixtureFlow(0)
    full = heun(flow, flow.noise, levels(STEPS))
    report, result = ours(flow, 0.02, max_skips=2, sampler=heun)
    assert report.computed == flow.calls
    assert report.computed + report.skipped == 2 * STEPS - 1
    assert report.skipped > 20
    assert relative(result, full) < 0.01


def run_of_skips(pattern: list[bool]) -> int:
    longest = here = 0
    for skipped in pattern:
        here = here + 1 if skipped else 0
        longest = max(longest, here)
    return longest


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_skips_in_a_row_than_allowed(limit):
    flow, pattern = MixtureFlow(0), []
    cache = StepCache(StepCacheSettings(0.5, START, END, limit))

    def denoise(x, t):
        flow.calls = 0
        out = cache.evaluate([0], x, t, lambda: [flow(x, t)])[0]
        pattern.append(flow.calls == 0)
        return out

    euler(denoise, flow.noise, levels(STEPS))
    assert run_of_skips(pattern) == limit
    outside = [not END < t <= START for t in levels(STEPS)[:-1]]
    assert not any(s for s, out in zip(pattern, outside, strict=True) if out)


def straight(cache, key=0, first=1.0, steps=20, x=None, seen=None):
    """A run on a velocity that is a straight line in sigma: every forecast fits."""
    x = torch.randn(2, 4, 3, 3) if x is None else x
    slope = torch.ones_like(x)
    for i in range(steps):
        sigma = first * (1 - i / steps)

        def compute(sigma=sigma):
            if seen is not None:
                seen.append(sigma)
            return [x - sigma * (2 + sigma) * slope]

        yield sigma, cache.evaluate([key], x, sigma, compute)[0], x


def test_results_share_no_memory_with_the_samplers_latent():
    """Samplers change x in place; a forecast that kept a view of it would change with it."""
    cache = StepCache(StepCacheSettings(0.1, max_skips=2))
    kept = torch.randn(1, 4, 2, 2)
    slope, worst = torch.randn(1, 4, 2, 2), 0.0
    for i in range(12):
        sigma = 1 - i / 12
        want = kept - sigma * (1 + sigma) * slope
        out = cache.evaluate([0], kept, sigma, lambda want=want: [want.clone()])[0]
        worst = max(worst, float((out - want).abs().max()))
        kept.mul_(0.5)
        out.fill_(float("nan"))
    assert cache.report().skipped >= 6
    assert worst < 1e-5


def test_a_computed_result_is_returned_as_it_is():
    cache = StepCache(StepCacheSettings(0.1))
    outputs = [torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)]
    assert cache.evaluate([0], torch.randn(1, 4, 2, 2), 0.5, lambda: outputs) is outputs


def test_dtype_of_the_latent_is_kept():
    x = torch.randn(1, 4, 2, 2).bfloat16()
    outs = [out.dtype for _, out, _ in straight(StepCache(StepCacheSettings(0.1)), x=x)]
    assert set(outs) == {torch.bfloat16}


def test_conditions_have_histories_of_their_own():
    """Two conditions with opposite velocities, in one call; then one of them alone."""
    cache = StepCache(StepCacheSettings(0.1, max_skips=2))
    x, computed = torch.randn(1, 4, 2, 2), 0
    for i in range(18):
        sigma = 1 - i / 20
        want = [x - sigma * (2 + sigma), x + sigma * (2 + 3 * sigma)]
        keys = ["positive", "negative"]
        if i >= 12:
            keys, want[1] = ["positive", None], torch.zeros_like(x)
        before = cache.report().computed
        outs = cache.evaluate(keys, x, sigma, lambda want=want: want)
        computed += cache.report().computed > before
        for out, exact in zip(outs, want, strict=True):
            assert float((out - exact).abs().max()) < 1e-4
    assert cache.report().skipped == 18 - computed > 8


def test_a_new_key_or_shape_starts_afresh():
    cache, seen = StepCache(StepCacheSettings(0.1, max_skips=9)), []
    list(straight(cache, key="a", seen=seen))
    assert len(seen) < 10
    del seen[:]
    list(straight(cache, key="b", seen=seen))
    assert len(seen) >= 3
    cache, seen = StepCache(StepCacheSettings(0.1, max_skips=9)), []
    run = straight(cache, seen=seen)
    for _ in range(10):
        next(run)
    made = len(seen)
    wider = torch.randn(3, 4, 3, 3)
    cache.evaluate([0], wider, 0.4, lambda: seen.append("wider") or [wider])
    assert len(seen) == made + 1


def test_noise_that_rises_again_starts_afresh():
    cache, seen = StepCache(StepCacheSettings(0.5, max_skips=9)), []
    list(straight(cache, seen=seen))
    del seen[:]
    list(straight(cache, seen=seen))
    assert seen[:3] == [1.0, 0.95, 0.9]


def test_moving_context_windows_do_not_pile_up():
    cache = StepCache(StepCacheSettings(0.1))
    x = torch.randn(1, 4, 2, 2)
    for i in range(40):
        for window in range(3):
            cache.evaluate([(window, i)], x, 1 - i / 40, lambda: [x])
    assert cache.report().skipped == 0
    assert len(cache._tracks) <= 3 * 6


def test_an_unpredictable_velocity_is_never_skipped():
    cache, make = StepCache(StepCacheSettings(0.2)), torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=make)
    for i in range(30):
        noise = torch.randn(1, 4, 8, 8, generator=make)
        cache.evaluate([0], x, 1 - i / 30, lambda noise=noise: [noise])
    assert cache.report().skipped == 0


def test_nan_is_never_skipped():
    cache = StepCache(StepCacheSettings(1.0))
    x = torch.full((1, 4, 2, 2), float("nan"))
    for i in range(10):
        cache.evaluate([0], x, 1 - i / 10, lambda: [x])
    assert cache.report().computed == 10


def test_clear_leaves_no_tensor():
    cache = StepCache(StepCacheSettings(0.1))
    list(straight(cache))
    report = cache.report()
    cache.clear()
    assert not cache._tracks
    assert cache.report() == report


def taken_in(forecast, sigma, velocity):
    miss = forecast.learn(sigma, velocity)
    if miss is not None:
        forecast.checked(float(miss))


def test_damping_follows_the_data():
    """A velocity that jumps to and fro: the line has to be damped away to holding the value."""
    forecast, make = VelocityForecast(), torch.Generator().manual_seed(1)
    level = torch.randn(1, 500, generator=make)
    for i in range(6):
        taken_in(forecast, 1 - i / 10, level + 0.1 * torch.randn(1, 500, generator=make))
    assert relative(forecast.velocity(0.4), level) < 0.2
    straight_line = VelocityForecast()
    for i in range(6):
        taken_in(straight_line, 1 - i / 10, level * (2 - i / 10))
    assert relative(straight_line.velocity(0.4), level * 1.4) < 1e-5


def test_the_worst_sample_of_a_batch_decides():
    cache, make = StepCache(StepCacheSettings(0.2)), torch.Generator().manual_seed(0)
    x = torch.zeros(8, 4, 8, 8)
    for i in range(30):
        sigma = 1 - i / 30
        denoised = torch.full_like(x, -sigma)
        denoised[5] = torch.randn(4, 8, 8, generator=make)
        cache.evaluate([0], x, sigma, lambda denoised=denoised: [denoised])
    assert cache.report().skipped == 0


def test_report_and_advice():
    report, _ = ours(MixtureFlow(0), 0.05)
    data = report.data()
    assert data["computed"] + data["skipped"] == STEPS
    assert 0 < data["expected_path_error"] < 0.05
    assert f"{data['computed']} of {STEPS} model calls" in report.text()
    assert [len(advice(*case)) for case in ((0.05, 30), (0.0, 30), (0.05, 8), (0, 4))] == [
        0,
        1,
        1,
        2,
    ]
