"""torch.compile with a count of the graphs it makes, a way out of its limit, and clear refusals."""

from __future__ import annotations

import functools
import itertools
import os
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from ..errors import FrugalError

# In the name of torch's error.
TOO_OLD = "TooOld"
_numbers = itertools.count()


class Graphs:
    """Compiled calls of modules, or functions, of one kind. Every call is one graph or an error.

    backend, dynamic: as torch.compile knows them.
    """

    def __init__(self, backend: str, dynamic: bool | None = None):
        # Here and not above: it costs seconds, and only those who compile need it.
        from torch._dynamo import exc

        self.backend, self.dynamic = backend, dynamic
        # What PyTorch learns of sizes that change it keeps by name and place in the file.
        self._name = f"_run_{next(_numbers)}"
        self.made = 0
        self._refusals = exc
        self._call = self._compiled()

    def __call__(self, module: Callable[..., Any], *args, **kwargs) -> tuple[Any, int, float]:
        """(what the module returns, graphs made for this call, seconds it took if any was made)."""
        made, start = self.made, time.perf_counter()
        try:
            out = self._call(module, *args, **kwargs)
        except self._refusals.FailOnRecompileLimitHit:
            # So many sizes were seen that PyTorch gives up; their graphs are dropped.
            self._call = self._compiled()
            out = self._guarded(module, *args, **kwargs)
        except self._refusals.TorchDynamoException as error:
            raise cannot(error) from error
        new = self.made - made
        return out, new, time.perf_counter() - start if new else 0.0

    def _guarded(self, module, *args, **kwargs):
        try:
            return self._call(module, *args, **kwargs)
        except self._refusals.TorchDynamoException as error:
            raise cannot(error) from error

    def _compiled(self):
        backend = torch._dynamo.lookup_backend(self.backend)

        def counting(graph, inputs):
            self.made += 1
            return backend(graph, inputs)

        # PyTorch keeps graphs per code object, so this has one of its own.
        own = types.FunctionType(_run.__code__.replace(co_name=self._name), _run.__globals__)
        return torch.compile(own, backend=counting, fullgraph=True, dynamic=self.dynamic)


def _run(module, *args, **kwargs):
    return module(*args, **kwargs)


def cannot(error: BaseException) -> FrugalError:
    """The refusal for an error of PyTorch's compiler, with what helps on this system."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    text = " ".join(lines[:2]).encode("ascii", "replace").decode()[:300]
    do = "install it, or turn compiling off"
    if TOO_OLD in type(error).__name__:
        do = "turn compiling off, for Triton makes no code for this card"
    elif os.name == "nt":
        do = "install triton-windows for a GPU or Visual C++ for a CPU, or turn compiling off"
    return FrugalError(
        f"PyTorch could not compile ({text.rstrip('.')})",
        "a working compiler: Triton for a GPU, a C++ compiler for a CPU",
        do,
    )


@functools.cache
def probe(device: torch.device, backend: str) -> None:
    """Raises FrugalError where a small graph cannot be compiled for `device`."""
    Graphs(backend)(_Small(), torch.ones(64, device=device))


class _Small(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * 2 + 1
