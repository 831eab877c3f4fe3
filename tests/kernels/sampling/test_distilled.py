"""Noise levels of distilled models, and what is said of a run that differs."""

from __future__ import annotations

import pytest

from frugal.kernels.sampling.distilled import advice, schedule

ONE = {"the model": True}


def test_four_steps_are_the_published_ones():
    assert [round(1000 * sigma, 1) for sigma in schedule(4)] == [1000, 937.5, 833.3, 625, 0]
    assert advice(schedule(4), ONE, {}) == []


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_another_shift_is_said_with_what_to_set(steps):
    assert not advice(schedule(steps, 5.005), ONE, {})
    (note,) = advice(schedule(steps, 8), ONE, {})
    assert "shift 5 and the scheduler to simple" in note
    if steps == 4:
        assert note.startswith("timesteps 1000, 960, 888.9, 727.3, 0: ")
        assert "1000, 937.5, 833.3, 625, 0" in note


@pytest.mark.parametrize("sigmas", [[], schedule(3, 8), schedule(20, 8)])
def test_runs_of_other_lengths_have_no_schedule(sigmas):
    assert advice(sigmas, ONE, {}) == []


def test_experts_by_name():
    loras = {"the high noise expert": False, "the low noise expert": True}
    notes = advice([], loras, {"the low noise expert": 3.5})
    assert notes[0].startswith("the low noise expert runs at cfg 3.5")
    assert notes[1].startswith("no LoRA on the high noise expert:")
    assert advice([], dict.fromkeys(loras, True), {"the low noise expert": 0.0}) == []
