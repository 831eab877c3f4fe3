"""The planner: what it chooses for a forward whose peaks are given, and what it says about it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frugal.kernels.memory import plan as memory
from frugal.kernels.memory import plan_picture
from frugal.kernels.memory.plan import (
    DECODE,
    SAMPLE,
    TEXT,
    Decoding,
    Job,
    MemoryOptions,
    Phase,
    Weights,
    make_plan,
)

GB = 10**9
JOB = Job(832, 480, 81)
LATENTS = 12 * 4 * 16 * 21 * 60 * 104


def peak(memory_options: MemoryOptions) -> int:
    """Two conditions of 4 GB each; feed-forward 3 of them, self-attention 2 beside 1."""
    size = GB + max(3 * GB // memory_options.pieces, 2 * GB // memory_options.attention)
    return size if memory_options.sequential else 2 * size


def plan(budget: float, weights: float = 5, peak=peak, **options):
    held = Weights(int(weights * GB), {"int8": int(weights * GB)}, GB // 10, w4a8=3 * GB)
    job = options.pop("job", JOB)
    return make_plan("Wan", job, held, peak, int(budget * GB), "typed in", **options)


def test_tokens_and_latents():
    assert JOB.latent == (21, 60, 104) and JOB.tokens == 32_760
    assert Job(1280, 720, 81).tokens == 75_600
    assert dict(plan(99).phases[0].parts)[memory.LATENTS] == LATENTS


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (14, MemoryOptions()),
        (9.5, MemoryOptions(True)),
        (8.5, MemoryOptions(True, 2)),
        (7.6, MemoryOptions(True, 4, 2)),
    ],
)
def test_the_least_costly_switches_that_fit(budget, expected):
    found = plan(budget)
    assert found.fits and not found.streamed and found.memory_options == expected
    assert found.phases[-1].total == 5 * GB + peak(expected) + LATENTS <= budget * GB
    # One notch less does not fit.
    if expected != MemoryOptions():
        assert 5 * GB + LATENTS + found.peaks[-2][1] > budget * GB


def test_without_guidance_there_is_nothing_to_separate():
    found = plan(
        7.6,
        job=Job(832, 480, 81, guided=False),
        peak=lambda s: peak(MemoryOptions(True, s.pieces, s.attention)),
    )
    assert found.memory_options == MemoryOptions(False, 4, 2)


def test_weights_are_streamed_once_the_switches_are_used_up():
    found = plan(3)
    least = peak(MemoryOptions(True, 8, 8))
    assert peak(found.memory_options) == least
    assert found.fits and found.phases[-1].total == 3 * GB
    # Two layers are on their way while one computes.
    assert found.streamed == 5 * GB + least + LATENTS - 3 * GB + 2 * GB // 10
    assert any("W4A8" in line and "3.00 GB" in line for line in found.advice)


def test_what_cannot_fit_says_so():
    found = plan(1.2)
    assert not found.fits and found.text().startswith("does NOT fit: ")
    assert "smaller size or fewer frames" in found.advice[0]


def test_caches_and_expanded_layers_are_counted():
    held = Weights(GB, {}, 0, expanded=7, caches={memory.CROSS_KV: 11})
    parts = make_plan("Wan", JOB, held, lambda _: 13, 9 * GB, "").phases[0].parts
    assert sum(parts.values()) == GB + 7 + 11 + 13 + LATENTS


@pytest.mark.parametrize(
    ("budget", "work", "said"), [(9, 6, None), (6, 4, "in chunks"), (4, 2, "tiles")]
)
def test_decoding_takes_the_first_way_that_fits(budget, work, said):
    vae = Decoding(GB // 2, 6 * GB, 4 * GB, 2 * GB)
    found = plan(budget, weights=1, decoding=vae)
    assert found.phases[-1].name == DECODE
    assert found.phases[-1].total == GB // 2 + work * GB
    assert found.before[-1].total == GB // 2 + 6 * GB
    assert said is None or any(said in line for line in found.advice)


def test_phases_come_in_the_order_of_the_run():
    text = Phase(TEXT, {memory.WEIGHTS: 11 * GB})
    found = plan(9, encoder=text, decoding=Decoding(1, 1, 1, 1))
    assert [phase.name for phase in found.phases] == [TEXT, SAMPLE, DECODE]
    # The encoder is larger than the budget, which ComfyUI deals with: said, but no failure.
    assert found.fits and "text encoder" in found.advice[-1]


def test_text_data_and_picture_show_the_same():
    found = plan(8.5, decoding=Decoding(GB // 2, 6 * GB, 4 * GB, 2 * GB))
    data = json.loads(found.json())
    assert data["totals"] == {phase.name: phase.total for phase in found.phases}
    assert data["memory_options"] == {"sequential": True, "pieces": 2, "attention": 1}
    assert found.text().startswith("fits: 8.10 GB of 8.50 GB (typed in)\n")
    assert found.text().isascii()
    image = plan_picture.picture(found)
    assert image.shape == (560, 1024, 3) and image.dtype == np.uint8
    # Bars are as high as their bytes: pixels of the colour of weights, planned and before.
    colour = np.array(plan_picture.COLOURS[memory.WEIGHTS])
    columns = (image[:490] == colour).all(-1).sum(0)
    left, right = plan_picture.LEFT, 1024 - plan_picture.RIGHT
    most = max(phase.total for phase in (*found.before, *found.phases))
    height = round((560 - plan_picture.BOTTOM - plan_picture.TOP) * 5 * GB / most)
    assert abs(int(columns[left:right].max()) - height) <= 2
