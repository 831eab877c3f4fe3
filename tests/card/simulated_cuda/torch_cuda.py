"""`torch.cuda` of the simulated card: what Python code asks a card and its streams."""

from __future__ import annotations

import collections
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch

# They look for a real CUDA build once they believe in one.
import torch._dynamo
import torch._inductor

from . import waits
from .card import device as native


@dataclass
class State:
    """total: bytes of the card. Below CUDA 13 ComfyUI leaves comfy-kitchen's kernels off."""

    total: int = 0
    capability: tuple[int, int] = (8, 6)
    cuda: str = "12.8"


state = State()


class Properties:
    multi_processor_count, warp_size = 28, 32
    max_threads_per_multi_processor, regs_per_multiprocessor, gcnArchName = 1536, 65536, ""  # noqa: N815
    is_integrated = is_multi_gpu_board = 0
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 101376
    shared_memory_per_multiprocessor, L2_cache_size, uuid = 102400, 1 << 21, "simulated"

    def __init__(self):
        self.name, self.total_memory = name(), state.total
        self.major, self.minor = state.capability


def name(_: Any = None) -> str:
    return "Simulated CUDA {}.{}".format(*state.capability)


class Stream:
    """Everything runs at once; only who waits is told."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        Stream._made += 1
        self.device, self.priority = torch.device("cuda", 0), priority
        self.cuda_stream = self.stream_id = Stream._made

    def wait_stream(self, other: Any) -> None:
        assert other is None or isinstance(other, Stream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        waits.note("sync", "Stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self):
        _current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()


class ExternalStream(Stream):
    pass


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits.note("sync", "Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1e3 * (other.at - self.at)


_current = [Stream()]


@contextlib.contextmanager
def stream(given: Any):
    if given is not None:
        _current.append(given)
    try:
        yield
    finally:
        if given is not None:
            _current.pop()


class CudaRuntime:
    class cudaError:  # noqa: N801
        success = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        native.pin(int(address), int(size))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if native.unpin(int(address)) else 1

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802
        return mem_get_info()


class DeviceScope:
    def __init__(self, device: Any = None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> bool:
        return False


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return max(0, state.total - native.allocated()), state.total


def memory_stats(device: Any = None) -> dict[str, int]:
    found: dict[str, int] = collections.defaultdict(int)
    for kind in ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes"):
        for pool in ("all", "small_pool", "large_pool"):
            found[f"{kind}.{pool}.current"] = native.allocated()
            found[f"{kind}.{pool}.peak"] = native.peak()
    return found


def seed(value: int) -> None:
    native.default_generator().manual_seed(int(value))


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return native.default_generator().get_state()


def set_rng_state(value: torch.Tensor, device: Any = "cuda") -> None:
    native.default_generator().set_state(value)


def current_stream(device: Any = None) -> Stream:
    return _current[-1]


def allocated(device: Any = None) -> int:
    return native.allocated()


def peak(device: Any = None) -> int:
    return native.peak()


def install() -> None:
    native.on_report(waits.note)
    members: dict[str, Any] = dict(
        _lazy_init=lambda: None, init=lambda: None, is_available=lambda: True,
        is_initialized=lambda: True, _is_compiled=lambda: True, device_count=lambda: 1,
        current_device=lambda: 0, set_device=lambda d: None, device=DeviceScope,
        _device=DeviceScope, get_device_name=name,
        get_device_capability=lambda d=None: state.capability,
        get_device_properties=lambda d=None: Properties(),
        is_bf16_supported=lambda *_, **__: state.capability >= (8, 0),
        get_arch_list=lambda: ["sm_{}{}".format(*state.capability)],
        can_device_access_peer=lambda a, b: True, utilization=lambda d=None: 0,
        synchronize=lambda d=None: waits.note("sync", "torch.cuda.synchronize"),
        stream=stream, Stream=Stream, Event=Event, ExternalStream=ExternalStream,
        current_stream=current_stream, default_stream=lambda d=None: _current[0],
        set_stream=lambda s: _current.__setitem__(-1, s),
        is_current_stream_capturing=lambda: False, cudart=CudaRuntime,
        mem_get_info=mem_get_info, memory_stats=memory_stats, memory_allocated=allocated,
        max_memory_allocated=peak, memory_reserved=allocated, max_memory_reserved=peak,
        reset_peak_memory_stats=lambda d=None: native.reset_peak(), empty_cache=lambda: None,
        ipc_collect=lambda: None, get_allocator_backend=lambda: "native",
        manual_seed=seed, manual_seed_all=seed, get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
    )  # fmt: skip
    for key, value in members.items():
        setattr(torch.cuda, key, value)
    torch.cuda.memory.mem_get_info = mem_get_info
    torch.version.cuda = state.cuda
    torch.accelerator.is_available = lambda: True
    _install_pinned_memory()
    _install_storage_copies()


def _install_pinned_memory() -> None:
    empty = torch.empty

    def make(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if not pin_memory:
            return empty(*size, **options)
        where = torch.device(options.get("device") or "cpu")
        assert where.type == "cpu", "Only dense CPU tensors can be pinned"
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        shape = options.get("size", shape)
        return native.pinned_empty([int(n) for n in shape], options.get("dtype"))

    def pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        return native.pinned_empty(list(self.shape), self.dtype).copy_(self)

    def is_pinned(self: torch.Tensor, device: Any = None) -> bool:
        here = self.device.type == "cpu" and self.numel() > 0
        return here and native.is_pinned_pointer(self.data_ptr())

    torch.empty = make
    torch.Tensor.pin_memory = pin
    torch.Tensor.is_pinned = is_pinned


def _install_storage_copies() -> None:
    """Copies of a storage, which `deepcopy` makes, know only devices that torch was built for."""
    clone = torch.UntypedStorage.clone

    def clone_storage(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return clone(self)
        whole = torch.empty(0, dtype=torch.uint8, device="cuda")
        whole.set_(self)
        return whole.clone().untyped_storage()

    torch.UntypedStorage.clone = clone_storage
