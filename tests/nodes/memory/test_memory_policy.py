"""Out of memory in the middle of a run: the step is repeated with less, the run goes on."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.memory import chunks
from frugal.kernels.memory.plan import Job, MemoryOptions
from frugal.nodes._memory import is_out_of_memory
from frugal.nodes.memory import memory_plan_run, policy
from frugal.tests.helpers import sampling as bed

OOM = comfy.model_management.OOM_EXCEPTION
STEPS = 3


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 8)


def planned(model, monkeypatch):
    """A planned clone that starts without memory options, and what it said on the node."""
    said = []
    monkeypatch.setattr(memory_plan_run, "show_text", lambda _, line: said.append(line))
    plan, peaks = memory_plan_run.plan_of(model, Job(64, 64, 5), 0)
    assert plan.memory_options == MemoryOptions()
    clone = memory_plan_run.apply(model, plan, peaks, False, None)
    (run,) = (each.__self__ for each in clone.wrappers["outer_sample"][policy.KEY])
    return clone, run, said


def failing(model, run, when):
    """A clone whose forwards run out of memory while `when(number of the call, options)`."""
    calls = []

    def wrapper(executor, x, *args, **kwargs):
        calls.append((x.shape[0], run.state.now))
        if when(len(calls), run.state.now):
            raise OOM("injected: CUDA out of memory")
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.oom", wrapper)
    return clone, calls


def test_the_step_is_repeated_and_the_run_goes_on(wan, prompts, monkeypatch):
    expected = bed.sample(wan, prompts, STEPS)
    clone, run, said = planned(wan, monkeypatch)
    # The second step fails until the conditions are separate.
    clone, calls = failing(clone, run, lambda number, now: number >= 2 and not now.sequential)
    seen = []
    out = bed.sample(clone, prompts, STEPS, callback=lambda step, *_: seen.append(step))
    assert seen == [0, 1, 2]
    assert [rows for rows, _ in calls] == [2, 2, 1, 1, 1, 1]
    assert torch.allclose(out, expected, atol=1e-4)
    assert len(said) == 1 and "out of memory: retrying this step" in said[0]
    assert "run sequentially" in said[0]
    # The next run starts as planned.
    assert run.state.now == MemoryOptions()
    assert "memory_required" not in vars(wan.model)


def test_each_failure_takes_one_notch_that_lowers_something(wan, prompts, monkeypatch):
    clone, run, said = planned(wan, monkeypatch)
    clone, calls = failing(clone, run, lambda number, now: now.attention < 2)
    latent = torch.zeros(1, 16, 4, 32, 32)
    bed.sample(clone, prompts, 1, latent=latent)
    notches = [now for _, now in calls]
    assert notches[0] == MemoryOptions() and notches[1] == MemoryOptions(True)
    assert notches[-1].attention == 2 and len(said) == len(set(notches)) - 1
    shape = tuple(latent.shape[2:])
    sizes = [run.peaks.of(1 if now.sequential else 2, shape, now) for now in dict.fromkeys(notches)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_when_nothing_is_left_it_says_what_to_do(wan, prompts, monkeypatch):
    clone, run, said = planned(wan, monkeypatch)
    clone, _ = failing(clone, run, lambda *_: True)
    with pytest.raises(OOM, match=r"^choose a smaller size or fewer .* room for a forward pass of"):
        bed.sample(clone, prompts, 1)
    assert said and run.state.now == MemoryOptions()
    assert "memory_required" not in vars(wan.model)
    # ComfyUI puts all models away when it sees its own type.
    assert is_out_of_memory(OOM("x"))


def test_other_errors_pass(wan, prompts, monkeypatch):
    clone, _, said = planned(wan, monkeypatch)

    def broken(*_, **__):
        raise RuntimeError("a shape is wrong")

    clone = clone.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.bug", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        bed.sample(clone, prompts, 1)
    assert not said


def test_the_last_resort_moves_weights_off_the_device(wan, monkeypatch):
    moved = []

    class Card:
        load_device, offload_device = torch.device("cuda", 0), torch.device("cpu")

        def loaded_size(self):
            return 1000

        def model_size(self):
            return 2000

        def partially_unload(self, device, amount):
            moved.append((device.type, amount))
            return 230

    free = [10**6]
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: free[0])
    assert policy.release_weights(Card(), 500) == 230 and moved == [("cpu", 200)]
    # What the forward lacks, where that is more.
    free[0] = 50
    assert policy.release_weights(Card(), 500) == 230 and moved[1:] == [("cpu", 450)]
    assert policy.release_weights(wan, 500) == 0


def test_weights_that_come_back_are_released_once_per_call(wan, prompts, monkeypatch):
    """As where a layer brings its weight along."""
    clone, run, _ = planned(wan, monkeypatch)
    released = []

    def release(*_):
        released.append(1)
        assert len(released) <= STEPS, "the same is tried again and again"
        return 10**6

    monkeypatch.setattr(policy, "release_weights", release)
    always, _ = failing(clone, run, lambda *_: True)
    with pytest.raises(OOM, match="no room for a forward"):
        bed.sample(always, prompts, STEPS)
    assert released == [1]
    # Each call may do it once.
    released.clear()
    expected, done = bed.sample(clone, prompts, STEPS), []
    always, _ = failing(clone, run, lambda *_: len(released) <= len(done))
    out = bed.sample(always, prompts, STEPS, callback=lambda step, *_: done.append(step))
    assert torch.allclose(out, expected, atol=1e-4) and len(released) == STEPS
