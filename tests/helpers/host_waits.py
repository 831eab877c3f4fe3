"""What makes the host wait for the device, counted on any device, the CPU included.

A value that Python reads, a result whose size depends on values, and numbers that Python sends: on
an accelerator each of these stops the host until all work before it is done. On the CPU they cost
nothing, but they are the same calls, so code that is free of them here is free of them there.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Under these names torch reads a value, compares whole tensors, or counts what is not zero.
READS = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "bincount", "histc", "_linalg_check_errors", "repeat_interleave",
)  # fmt: skip
# What `torch.tensor(numbers)` comes through.
SENDS = ("lift_fresh", "lift_fresh_copy")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "repeat_interleave" and func._overloadname != "Tensor":
            name = ""
        if name in (*READS, *SENDS) or _moves(name, args, kwargs):
            self.seen[name, _place()] += 1
        return func(*args, **kwargs)


class _CountingMethods(TorchFunctionMode):
    """The ways out to Python that pass by no operator while the tensor is on the CPU."""

    def __init__(self, seen: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy") and args[0].device.type == "cpu":
            self.seen[name, _place()] += 1
        return func(*args, **(kwargs or {}))


def _moves(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes to or from the host and nobody said that it need not be waited for."""
    if name == "_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        waits = not kwargs.get("non_blocking", False)
    elif name == "copy_":
        source, target = args[1].device, args[0].device
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        return False
    return source.type != target.type and "meta" not in (source.type, target.type) and waits


def _place() -> str:
    """File and line of the pack that the call came from."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        parts = frame.filename.replace("\\", "/").split("/")
        if {"kernels", "nodes"} & set(parts[:-1]) and not {"site-packages", "tests"} & set(parts):
            return f"{'/'.join(parts[-3:])}:{frame.lineno}"
    return "elsewhere"


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Counts (operation, place in the pack) inside."""
    mode = _Counting()
    with mode, _CountingMethods(mode.seen):
        yield mode.seen
