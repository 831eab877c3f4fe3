"""One rule for memory that runs out in the middle of a run: give something up and call again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class NothingLeftError(RuntimeError):
    """Memory ran out and there was nothing left to give up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that memory ran out, on the device or in main memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator has no type of its own, and the drivers' errors come under another one.
    said = str(error).lower()
    driver = getattr(torch, "AcceleratorError", ())
    return "defaultcpuallocator" in said or (isinstance(error, driver) and "out of memory" in said)


def retry(
    call: Callable[[], Result], ran_out: Callable[[Exception], bool], remedies: Iterator[None]
) -> Result:
    """`call()`, repeated as long as `ran_out` says yes to what it raised.

    remedies: each step gives one thing up for good, so there is an end to them: then
    NothingLeftError is raised. Any other exception passes through.
    """
    while True:
        try:
            return call()
        except Exception as error:
            if not ran_out(error):
                raise
        # Behind the clause: until then the exception holds the tensors that filled the memory.
        try:
            next(remedies)
        except StopIteration:
            raise NothingLeftError from None
