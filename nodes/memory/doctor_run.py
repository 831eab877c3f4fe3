"""Reads the facts for the doctor off the running ComfyUI, without importing what it has not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.quant_ops
import psutil
import torch

from ...kernels.attention.call import capability_of
from ...kernels.device_types import why_no_float8, why_no_int8_product
from ...kernels.memory.doctor import ATTENTION, REFERENCE, Facts
from .._kitchen import kitchen_backends

# Import name -> name of the distribution where they differ.
DISTRIBUTIONS = {
    "comfy_kitchen": "comfy-kitchen",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
}

# ComfyUI's question whether the device multiplies in a format -> the formats it asks for.
NATIVE_IF = {
    "supports_fp8_compute": ("float8_e4m3fn", "float8_e5m2"),
    "supports_nvfp4_compute": ("nvfp4",),
    "supports_mxfp8_compute": ("mxfp8",),
}


def gather() -> Facts:
    """Everything the doctor wants to know."""
    device = comfy.model_management.get_torch_device()
    memory = psutil.virtual_memory()
    own = device.type != "cpu"
    return Facts(
        comfyui=_comfyui_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        kind=device.type,
        capability=capability_of(device),
        memory_total=int(comfy.model_management.get_total_memory(device)) if own else 0,
        memory_free=int(comfy.model_management.get_free_memory(device)) if own else 0,
        ram_total=memory.total,
        ram_free=memory.available,
        reserved=int(comfy.model_management.extra_reserved_memory()) if own else 0,
        streaming=_streaming(),
        kitchen=version_of("comfy_kitchen"),
        kitchen_used=bool(getattr(comfy.quant_ops, "_CK_AVAILABLE", False)),
        backends=kitchen_backends(),
        formats=tuple(sorted(getattr(comfy.quant_ops, "QUANT_ALGOS", {}))),
        emulated=_emulated(device),
        no_float8=why_no_float8(device),
        no_int8=why_no_int8_product(device),
        attention={name: version_of(name) for name in ATTENTION if importable(name)},
        registered=tuple(
            sorted(getattr(comfy.ldm.modules.attention, "REGISTERED_ATTENTION_FUNCTIONS", {}))
        ),
        active=active_attention(),
        sdpa=_sdpa(),
        numba=version_of("numba"),
        triton=version_of("triton"),
        gguf=version_of("gguf"),
    )


def _emulated(device: torch.device) -> tuple[str, ...]:
    names: list[str] = []
    for question, formats in NATIVE_IF.items():
        # Versions that do not ask have not got the format either.
        ask = getattr(comfy.model_management, question, None)
        if ask is not None and not ask(device):
            names += formats
    return tuple(names)


def importable(name: str) -> bool:
    """Whether a module of this name can be found; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def version_of(name: str) -> str | None:
    """Version of a package, "unknown version" if it has no metadata, None if it is not there."""
    if not importable(name):
        return None
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _comfyui_version() -> str | None:
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return __version__


def _streaming() -> bool:
    management = sys.modules.get("comfy.memory_management")
    return bool(getattr(management, "aimdo_enabled", False))


def eager_rotation(device: torch.device) -> Any:
    """comfy-kitchen's rotary embedding made of PyTorch operations, if `device` computes with that
    one; None where a kernel of its own does it or ComfyUI does not use comfy-kitchen.
    """
    backends = kitchen_backends()
    capability = capability_of(device)
    for name, backend in backends.items():
        kernel = name != REFERENCE and device.type == "cuda"
        if kernel and backend.runs("apply_rope1", capability):
            return None
    if REFERENCE not in backends:
        return None
    eager = importlib.import_module("comfy_kitchen.backends.eager")
    return getattr(eager, "apply_rope1", None)


def active_attention() -> str:
    """The name of the attention function that ComfyUI uses; empty if it has none."""
    attention = comfy.ldm.modules.attention
    active = attention.optimized_attention
    for name, function in getattr(attention, "REGISTERED_ATTENTION_FUNCTIONS", {}).items():
        if function is active:
            return name
    return getattr(active, "__name__", "")


def _sdpa() -> tuple[str, ...]:
    cuda = torch.backends.cuda
    states = {
        "cudnn": getattr(cuda, "cudnn_sdp_enabled", lambda: False),
        "flash": cuda.flash_sdp_enabled,
        "memory efficient": cuda.mem_efficient_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    return tuple(name for name, enabled in states.items() if enabled())
