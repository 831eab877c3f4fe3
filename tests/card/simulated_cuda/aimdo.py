"""A stand-in for comfy-aimdo, ComfyUI's dynamic VRAM, on the simulated card.

Weights get addresses in a reservation (VBAR); `fault` says whether they are resident, and under
which signature. Beyond what `install` lets be resident, or a VBAR's watermark limit, `fault` gives
None and ComfyUI copies the layer through a buffer at each use, as on a card that is too small.
Evicted memory is filled with NaN bytes.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import mmap
import os
import sys
import types
import weakref
from typing import Any, ClassVar

import torch

from .card import device as native

# What happened. An entry of FAULTS must never appear.
counts: collections.Counter[str] = collections.Counter()
FREED_BY_COPY, FREED_TWICE = "freed by a copy of it", "freed twice"
UNPINNED = "unpinned more often than pinned"
FAULTS = (FREED_BY_COPY, FREED_TWICE, UNPINNED)
NO_LIMIT = 1 << 62
_handles = itertools.count(1)
_freed: set[int] = set()
_resident_limit = NO_LIMIT


class Handle:
    """What stands for memory of the native library: freed once, by the object that opened it."""

    def _open(self) -> None:
        self._ptr, self._owner = next(_handles), id(self)

    def __del__(self) -> None:
        ptr = self.__dict__.get("_ptr")
        if ptr is None:
            return
        if self._owner != id(self):
            # The real library would now free memory that the original still uses.
            counts[FREED_BY_COPY] += 1
            return
        if ptr in _freed:
            counts[FREED_TWICE] += 1
        _freed.add(ptr)
        self._ptr = None


class Reservation:
    """Anonymous memory that costs nothing until it is touched."""

    def __init__(self, size: int):
        no_reserve = 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self.map = mmap.mmap(-1, max(4096, int(size)), flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def __deepcopy__(self, memo: dict) -> Reservation:
        return self


class ModelVBAR(Handle):
    all: ClassVar[weakref.WeakSet[ModelVBAR]] = weakref.WeakSet()

    def __init__(self, size: int, device: int):
        self._open()
        self._held = Reservation(min(int(size), 1 << 36))
        self.base_addr, self.max_size = self._held.address, size
        self.offset, self.device, self.limit = 0, device, NO_LIMIT
        self.resident: dict[int, int] = {}  # address -> bytes
        self.version: collections.Counter[int] = collections.Counter()
        self.pinned: collections.Counter[int] = collections.Counter()
        ModelVBAR.all.add(self)

    def prioritize(self, malloc_async_clamp: Any = None) -> None:
        pass

    def deprioritize(self) -> None:
        pass

    def alloc(self, size: int) -> tuple[ModelVBAR, int, int]:
        self.offset = (self.offset + 511) & ~511
        made = self.base_addr + self.offset
        self.offset += size
        return (self, made, size)

    def fault(self, address: int, size: int) -> Any:
        counts["fault"] += 1
        if address not in self.resident:
            held = sum(vbar.loaded_size() for vbar in ModelVBAR.all)
            if held + size > _resident_limit or address - self.base_addr + size > self.limit:
                counts["refused"] += 1
                return None
            self.resident[address] = size
            native.add(size)
            self.version[address] += 1
        self.pinned[address] += 1
        return (ctypes.c_uint32 * (size // (32 * 1024**2) + 2))(self.version[address])

    def unpin(self, address: int, size: int) -> None:
        self.pinned[address] -= 1
        if self.pinned[address] < 0:
            counts[UNPINNED] += 1

    def loaded_size(self) -> int:
        return sum(self.resident.values())

    def set_watermark_limit(self, size: int) -> None:
        self.limit = int(size)
        self._evict(lambda address, held: address - self.base_addr + held > self.limit)

    def set_watermark(self, size: int) -> None:
        self._evict(lambda address, held: address - self.base_addr + held > size)

    def free_memory(self, size: int) -> int:
        done = 0

        def wanted(address: int, held: int) -> bool:
            nonlocal done
            done += held
            return done - held < size

        return self._evict(wanted)

    def _evict(self, wanted: Any) -> int:
        free = [(a, n) for a, n in self.resident.items() if self.pinned[a] <= 0]
        gone = [(a, n) for a, n in free if wanted(a, n)]
        for address, size in gone:
            del self.resident[address]
            ctypes.memset(address, 0xFF, size)
            native.add(-size)
            counts["evicted"] += 1
        return sum(size for _, size in gone)

    def __del__(self) -> None:
        if self.__dict__.get("_owner") == id(self):
            native.add(-self.loaded_size())
        super().__del__()

    def get_nr_pages(self) -> int:
        return 1

    def get_watermark(self) -> int:
        return 1

    def get_residency(self) -> list[int]:
        return [1]


class VRAMBuffer:
    STEP = 16 << 20

    def __init__(self, max_size: int, device: int):
        self._held, self._allocated = Reservation(1 << 34), 0
        self.base_addr = self._held.address

    def size(self) -> int:
        return self._allocated

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        need = int(size) + int(offset)
        if need > self._allocated:
            grown = -(-need // self.STEP) * self.STEP
            native.add(grown - self._allocated)
            self._allocated = grown
        # What was in it belonged to another layer.
        ctypes.memset(self.base_addr + int(offset), 0xFF, int(size))
        return (self, self.base_addr + int(offset), int(size))

    def __del__(self) -> None:
        native.add(-self.__dict__.get("_allocated", 0))


class HostBuffer(Handle):
    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True):
        self._open()
        self._held = Reservation(2 * max(int(size), int(max_grow_size), 1 << 20))
        self.size = int(size)

    def get_raw_address(self) -> int:
        return self._held.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        self.size += int(size)
        return self._held.address

    def read_file_slice(
        self, file_obj: Any, file_offset: int, size: int, offset: int = 0, stream: int = 0,
        device_ptr: int = 0, device: int = -1,
    ) -> None:  # fmt: skip
        data = _read(file_obj, file_offset, size)
        ctypes.memmove(self._held.address + int(offset), data, int(size))
        if device_ptr:
            ctypes.memmove(int(device_ptr), data, int(size))
        self.size = max(self.size, int(offset) + int(size))

    def register(self, offset: int, size: int) -> None:
        pass

    def unregister(self, offset: int) -> None:
        pass

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = int(size)


class ModelMMAP:
    """Read only, as the real one is: who writes to a weight in the file is killed."""

    def __init__(self, path: Any):
        self._file = open(os.fspath(path), "rb")  # noqa: SIM115
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        size, file = os.path.getsize(path), self._file.fileno()
        self._at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)

    def get(self) -> int:
        return self._at

    def get_file_handle(self) -> int:
        return self._file.fileno()

    def bounce(self) -> bool:
        return True


def _read(file_obj: Any, offset: int, size: int) -> bytes:
    file = file_obj if isinstance(file_obj, int) else file_obj.fileno()
    data = os.pread(file, int(size), int(offset))
    assert len(data) == size, f"{len(data)} of {size} bytes at {offset}"
    return data


def read_file_to_device(
    file_obj: Any, offset: int, size: int, stream: int, device_ptr: int, device: int,
    mark_cold: bool = True,
) -> None:  # fmt: skip
    ctypes.memmove(int(device_ptr), _read(file_obj, offset, size), int(size))


def tensor_at(alloc: Any, device: Any) -> torch.Tensor:
    _, address, size = alloc
    return native.from_pointer(int(address), int(size))


def hostbuf_to_tensor(hostbuf: HostBuffer) -> torch.Tensor:
    view = (ctypes.c_uint8 * hostbuf.size).from_address(hostbuf.get_raw_address())
    return torch.frombuffer(view, dtype=torch.uint8)


def vbar_fault(alloc: Any) -> Any:
    return alloc[0].fault(alloc[1], alloc[2])


def vbar_unpin(alloc: Any) -> None:
    if alloc is not None:
        alloc[0].unpin(alloc[1], alloc[2])


def vbar_signature_compare(a: Any, b: Any) -> bool:
    return a is not None and b is not None and memoryview(a) == memoryview(b)


def reset_watermark_limits() -> None:
    for vbar in ModelVBAR.all:
        vbar.limit = NO_LIMIT


LOG_LEVELS = ("none", "critical", "error", "warning", "info", "detail", "debug", "verbose")


def install(enabled: bool, resident_mb: float | None = None) -> None:
    """Take the place of comfy_aimdo; before ComfyUI is imported.

    enabled: whether dynamic VRAM works. resident_mb: what all weights together may take.
    """
    global _resident_limit
    _resident_limit = NO_LIMIT if resident_mb is None else int(resident_mb * 1e6)
    parts: dict[str, dict[str, Any]] = {
        "control": dict(
            init=lambda *a, **k: True, init_devices=lambda d: enabled, deinit=lambda: None,
            lib=object(), devctxs=[1], analyze=lambda: None, get_total_vram_usage=lambda: 0,
            get_devctx=lambda d: 1,
            **{f"set_log_{level}": (lambda: None) for level in LOG_LEVELS},
        ),
        "model_vbar": dict(
            ModelVBAR=ModelVBAR, vbar_fault=vbar_fault, vbar_unpin=vbar_unpin,
            vbar_signature_compare=vbar_signature_compare,
            vbars_reset_watermark_limits=reset_watermark_limits, vbars_analyze=lambda d=None: 0,
        ),
        "vram_buffer": dict(VRAMBuffer=VRAMBuffer),
        "host_buffer": dict(
            HostBuffer=HostBuffer, read_file_to_device=read_file_to_device,
            cleanup_file_reader=lambda: None,
        ),
        "model_mmap": dict(ModelMMAP=ModelMMAP),
        "torch": dict(
            aimdo_to_tensor=tensor_at, hostbuf_to_tensor=hostbuf_to_tensor,
            get_torch_allocator=lambda: None,
            get_tensor_from_raw_ptr=lambda p, n, d: native.from_pointer(int(p), int(n)),
        ),
    }  # fmt: skip
    root = types.ModuleType("comfy_aimdo")
    root.__path__ = []
    sys.modules["comfy_aimdo"] = root
    for name, members in parts.items():
        module = types.ModuleType(f"comfy_aimdo.{name}")
        module.__dict__.update(members)
        setattr(root, name, module)
        sys.modules[f"comfy_aimdo.{name}"] = module
