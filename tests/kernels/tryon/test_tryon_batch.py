"""Who wears what, groups of one size, and a loop that loses nothing when memory runs out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import batching, plan


class OutOfMemoryError(RuntimeError):
    pass


def ran_out(error):
    return isinstance(error, OutOfMemoryError)


def test_order_of_delivery():
    assert batching.jobs(2, 3, batching.ALL) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert batching.jobs(3, 3, batching.PAIRS) == [(0, 0), (1, 1), (2, 2)]
    assert batching.jobs(1, 3, batching.PAIRS) == [(0, 0), (0, 1), (0, 2)]
    assert batching.jobs(3, 1, batching.PAIRS) == [(0, 0), (1, 0), (2, 0)]
    for persons, garments, mode in ((2, 3, batching.PAIRS), (0, 1, batching.ALL), (1, 1, "zip")):
        with pytest.raises(FrugalError):
            batching.jobs(persons, garments, mode)


def test_buckets_hold_one_size_each_and_start_small():
    found = batching.buckets([(96, 64), (64, 48), (96, 64), (64, 96)])
    assert found == {(64, 48): [1], (64, 96): [3], (96, 64): [0, 2]}
    assert list(found) == [(64, 48), (64, 96), (96, 64)]


def test_made_once_per_key():
    calls = []
    make = batching.OnceEach(lambda value: calls.append(value) or value * 2, 2)
    assert [make(key, key) for key in (1, 2, 1, 2, 1)] == [2, 4, 2, 4, 2]
    assert calls == [1, 2] and make.made == 2
    # Of three keys the one that was asked for the longest time ago is made again.
    assert [make(key, key) for key in (3, 1, 2)] == [6, 2, 4]
    assert calls == [1, 2, 3, 2] and make.made == 3


def test_rounds_hold_every_job_once_in_order():
    assert [list(part) for part in batching.rounds(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batching.rounds(0, 3) == []


@settings(deadline=None)
@given(
    count=st.integers(0, 30),
    size=st.integers(1, 9),
    room=st.integers(1, 9),
    late=st.sets(st.integers(1, 12)),
)
def test_every_job_is_done_once_whatever_runs_out(count, size, room, late):
    """Memory runs out for groups larger than `room`, and by chance at the calls in `late`."""
    calls, recovered, numbers = 0, 0, [3 * i for i in range(count)]

    def work(group):
        nonlocal calls
        calls += 1
        if len(group) > room or (calls in late and len(group) > 1):
            raise OutOfMemoryError
        return [number + 1 for number in group]

    def recover():
        nonlocal recovered
        recovered += 1

    outcome = batching.Outcome()
    batching.run_halving(numbers, size, work, ran_out, recover, outcome)
    assert outcome.results == {number: number + 1 for number in numbers}
    assert list(outcome.results) == numbers and outcome.failed is None
    assert sum(outcome.groups) == count and recovered == outcome.halvings
    # The group never grows back.
    assert outcome.groups == sorted(outcome.groups, reverse=True)


def test_one_alone_that_fails_stops_and_keeps_the_rest():
    def work(group):
        if 5 in group:
            raise OutOfMemoryError
        return group

    outcome = batching.Outcome()
    batching.run_halving(range(8), 4, work, ran_out, lambda: None, outcome)
    assert outcome.failed == 5 and list(outcome.results) == [0, 1, 2, 3, 4]


def test_another_error_passes_and_keeps_what_was_done():
    def work(group):
        if 2 in group:
            raise RuntimeError("something else")
        return group

    outcome = batching.Outcome()
    with pytest.raises(RuntimeError, match="something else"):
        batching.run_halving(range(4), 2, work, ran_out, lambda: None, outcome)
    assert list(outcome.results) == [0, 1]
    with pytest.raises(RuntimeError, match="1 results for 2 jobs"):
        batching.run_halving(range(2), 2, lambda group: group[:1], ran_out, lambda: None, outcome)


@pytest.mark.parametrize(
    "size, mebibytes",
    [((512, 384), 195), ((768, 576), 439), ((1024, 768), 780), ((1536, 1152), 1755)],
)
def test_bytes_per_picture_are_the_traced_ones(size, mebibytes):
    assert plan.bytes_per_picture(size) / 2**20 == pytest.approx(mebibytes, rel=2e-3)
    assert plan.bytes_per_picture(size, element=4) == 2 * plan.bytes_per_picture(size)
    assert 2 * plan.bytes_per_picture(size, guided=False) == plan.bytes_per_picture(size)


@given(st.integers(-(10**9), 10**11), st.integers(1, 10**9), st.integers(1, 64))
def test_micro_batch_fits_and_is_never_none(free, each, largest):
    count = plan.micro_batch(free, each, largest)
    assert 1 <= count <= largest
    assert count == 1 or count * each <= free
    assert count == largest or (count + 1) * each > free
