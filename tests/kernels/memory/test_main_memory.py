"""Main memory of runs with one and two experts: what adds up when, what fits, what is said."""

from __future__ import annotations

import pytest

from frugal.kernels.memory.main_memory import Held, main_memory

GB = 10**9
CHOICES = {"W4A8": 18 * GB, "fp16": 64 * GB, "fp8": 32 * GB}


def copied(memory):
    return [stage.copied // GB for stage in memory.stages]


def mapped(memory):
    return [stage.mapped // GB for stage in memory.stages]


def test_mapped_experts_take_nothing_of_their_own_where_they_are_streamed():
    pair = [Held(name, 0, 16 * GB) for name in ("high", "low")]
    memory = main_memory(pair, Held("text", 2 * GB, 5 * GB), 20 * GB, CHOICES)
    assert copied(memory) == [2, 2, 2, 2] and mapped(memory) == [37, 37, 37, 37]
    assert memory.room == 22 * GB and memory.fits
    (said,) = memory.advice()
    assert said.startswith("about 17.00 GB of the mapped files do not stay in main memory")


def test_what_ran_on_the_device_comes_back_as_a_copy():
    """Without streaming the first expert is one more copy after the switch, the text encoder
    after the text.
    """
    pair = [Held(name, 0, 16 * GB, True) for name in ("high", "low")]
    memory = main_memory(pair, Held("text", 0, 7 * GB, True), 28 * GB, CHOICES)
    assert [stage.name for stage in memory.stages] == [
        "text encoding", "high", "low", "after the run",
    ]  # fmt: skip
    assert copied(memory) == [0, 7, 23, 39] and mapped(memory) == [39, 32, 16, 0]
    assert not memory.fits
    (said,) = memory.advice()
    assert "needs 39.00 GB of main memory and 28.00 GB are there" in said
    assert "choose W4A8 files (18.00 GB in all)" in said


@pytest.mark.parametrize(
    ("free", "words"), [(33, "choose fp8 files"), (70, None), (1, "no file of this size fits")]
)
def test_the_largest_file_that_fits_is_named(free, words):
    copies = [Held(name, 32 * GB, 0) for name in ("high", "low")]
    memory = main_memory(copies, None, 0, CHOICES)
    # What is there already is part of the room.
    assert memory.room == 64 * GB and memory.fits and memory.advice() == []
    loaded = [Held("high", 0, 32 * GB, True), Held("low", 0, 32 * GB, True)]
    said = main_memory(loaded, None, free * GB, CHOICES).advice()
    assert (words is None and not said) or (words is not None and words in said[0])
