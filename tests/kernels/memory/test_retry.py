"""The one rule for memory that runs out."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from frugal.kernels.retry import NothingLeftError, is_out_of_memory, retry


class RanOutError(RuntimeError):
    pass


def ran_out(error):
    return isinstance(error, RanOutError)


@pytest.mark.parametrize("failures", range(4))
def test_one_remedy_per_failure_and_then_an_end(failures):
    given, calls = [], []

    def call():
        calls.append(len(given))
        if len(calls) <= failures:
            raise RanOutError
        return "done"

    remedies = (given.append(number) for number in range(2))
    if failures <= 2:
        assert retry(call, ran_out, remedies) == "done"
        assert calls == list(range(failures + 1)) and given == list(range(failures))
    else:
        with pytest.raises(NothingLeftError):
            retry(call, ran_out, remedies)
        assert calls == [0, 1, 2]


def test_other_errors_pass_and_take_nothing():
    given = []

    def call():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        retry(call, ran_out, (given.append(number) for number in range(2)))
    assert not given


def test_what_the_failed_call_held_is_gone_before_the_remedy():
    held, alive = [], []

    def call():
        if held:
            return None
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise RanOutError

    def remedies():
        gc.collect()
        alive.append(held[0]())
        yield

    retry(call, ran_out, remedies())
    assert alive == [None]


def test_who_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    ran = [torch.OutOfMemoryError("x"), MemoryError(), raised.value]
    if hasattr(torch, "AcceleratorError"):
        ran.append(torch.AcceleratorError("CUDA error: out of memory"))
        assert not is_out_of_memory(torch.AcceleratorError("CUDA error: illegal address"))
    assert all(map(is_out_of_memory, ran))
    assert not is_out_of_memory(RuntimeError("a shape is wrong: out of memory bounds"))
