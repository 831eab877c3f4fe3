"""The rule that the step cache is compared with is that of ComfyUI's EasyCache node."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy_extras import nodes_easycache

from frugal.tests.helpers.flows import EasyCacheRule, MixtureFlow, euler, levels, percent

STEPS = 50


class Executor:
    """The flow's velocity in place of a network, called as ComfyUI calls its wrappers."""

    def __init__(self, flow):
        self.flow = flow

    def __call__(self, x, timestep, **_):
        t = float(timestep[0])
        x = x.flatten(1)
        return ((x - self.flow(x, t)) / t)[..., None, None]


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_same_calls_and_same_result(threshold):
    flow = MixtureFlow(0)
    rule = EasyCacheRule(flow, threshold, percent(0.15), percent(0.95))
    wanted = euler(rule, flow.noise, levels(STEPS))
    calls, flow.calls = flow.calls, 0
    holder = nodes_easycache.EasyCacheHolder(
        threshold, 0.15, 0.95, subsample_factor=1, offload_cache_diff=False, output_channels=32
    ).prepare_timesteps(SimpleNamespace(percent_to_sigma=percent))
    executor = Executor(flow)

    def node(x, t):
        timestep = torch.tensor([t], dtype=torch.float64)
        options = {"easycache": holder, "sigmas": timestep, "uuids": ["prompt"]}
        holder.skip_current_step = False
        velocity = nodes_easycache.easycache_forward_wrapper(
            executor, x[..., None, None].clone(), timestep, transformer_options=options
        )
        return x - t * velocity.flatten(1)

    result = euler(node, flow.noise, levels(STEPS))
    assert (flow.calls, STEPS - holder.total_steps_skipped) == (calls, calls)
    assert calls < STEPS
    assert torch.allclose(result, wanted, rtol=1e-9, atol=1e-9)
