"""What a forward needs at most, in bytes, from a run on tensors without memory.

On torch's meta device every operation yields its result's shape and nothing else, so the whole
forward of a 14B model takes a fraction of a second and no memory. What is counted is what would be
alive: a storage counts from the operation that makes it until the last tensor on it is gone. The
same counter works on real tensors, which is how it is checked.

Counted are tensors. Not counted is what a kernel takes inside for itself (workspaces, the rows of
a fused attention) nor what the allocator rounds up.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = "block {}"
# Name of an operation as torch registers it -> a function of smaller operations to count in its
# place.
Decomposed = Mapping[str, Callable[..., Any]]
# Function of torch's interface -> a function that makes its result and nothing else.
Fused = Mapping[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class Trace:
    """Bytes alive at most during a call (`peak`) and after it, its result still held (`kept`);
    `phases`: the peak while each named module ran; seconds that the trace took.
    """

    peak: int
    kept: int
    phases: dict[str, int]
    seconds: float


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active.

    Use it without inference mode: there torch shows composite operations whole and so hides what
    they make inside.
    """

    def __init__(self, decomposed: Decomposed | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.phases: dict[str, int] = {}
        self._names: list[str] = []
        self._decomposed = decomposed or {}
        self._held: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        smaller = self._decomposed.get(func.name())
        if smaller is not None:
            with self:
                return smaller(*args, **(kwargs or {}))
        # What comes in from outside, such as weights, is no work of the call; a view on it neither.
        for each in _tensors((args, tuple((kwargs or {}).values()))):
            self._note(each.untyped_storage(), ours=False)
        result = func(*args, **(kwargs or {}))
        for each in _tensors(result):
            self._note(each.untyped_storage(), ours=True)
        return result

    def _note(self, storage: torch.UntypedStorage, ours: bool) -> None:
        # torch keeps one Python object per storage for as long as the storage lives.
        key = id(storage)
        if key in self._held:
            return
        size = storage.nbytes() if ours else 0
        self._held[key] = weakref.ref(storage, lambda _: self._gone(key)), size
        self.live += size
        self.peak = max(self.peak, self.live)
        for name in self._names:
            self.phases[name] = max(self.phases[name], self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._held.pop(key)[1]

    @contextmanager
    def watching(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Name the phases: what is made while a module of `modules` runs counts under its name."""
        with ExitStack() as stack:
            for name, module in modules.items():

                def enter(*_: Any, name: str = name) -> None:
                    self._names.append(name)
                    self.phases[name] = max(self.phases.get(name, 0), self.live)

                def leave(*_: Any) -> None:
                    self._names.pop()

                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)


class _OutputOnly(TorchFunctionMode):
    def __init__(self, fused: Fused):
        super().__init__()
        self._fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._fused.get(func, func)(*args, **(kwargs or {}))


def fused_attention(query: torch.Tensor, key: Any, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """What fused attention leaves: [B, H, N, D_v] on memory in the order [B, N, H, D_v]."""
    b, heads, rows = query.shape[:3]
    return query.new_empty(b, rows, heads, value.shape[-1]).transpose(1, 2)


def fused_norm(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What a fused norm leaves: a tensor like `x`."""
    return torch.empty_like(x)


def trace(
    call: Callable[[], Any],
    modules: Mapping[str, torch.nn.Module] | None = None,
    decomposed: Decomposed | None = None,
    fused: Fused | None = None,
) -> Trace:
    """Run `call`, which makes its own inputs and returns its result, and count what is alive.

    On the meta device for a prediction, on real tensors for a count. modules: name -> module, to
    have their peaks apart. decomposed, fused: see the types.
    """
    started = time.perf_counter()
    memory = LiveMemory(decomposed)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        memory.watching(modules or {}),
        _OutputOnly(fused or {}),
        memory,
    ):
        result = call()
    kept = memory.live
    del result
    return Trace(memory.peak, kept, memory.phases, time.perf_counter() - started)


def of_layers(three: Trace, layers: int) -> int:
    """Peak in bytes of a model of `layers` equal layers, from its trace with three, named BLOCK:
    what a layer leaves behind is left by every layer, its temporary memory is needed once.
    """
    last, one_before = three.phases[BLOCK.format(2)], three.phases[BLOCK.format(1)]
    return max(three.peak, last + (layers - 3) * (last - one_before))
