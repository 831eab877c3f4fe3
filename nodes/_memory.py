"""What the families share about memory that runs out, and about memory that is pinned."""

from __future__ import annotations

import sys

import comfy.model_management

from ..kernels import retry

WINDOWS = sys.platform == "win32"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or in main memory."""
    # Where ComfyUI answers itself, it also clears the driver's error.
    ask = getattr(comfy.model_management, "is_oom", None)
    return (ask is not None and bool(ask(error))) or retry.is_out_of_memory(error)


def pinning_may_fail() -> bool:
    """Whether ComfyUI pins weights where they lie and the system may refuse it for a mapped file.

    Windows with CUDA: nobody has shown that it pins a file's mapping, and after a refusal older
    versions leave the driver's error to whatever is called next.
    """
    pins = getattr(comfy.model_management, "MAX_PINNED_MEMORY", 0) > 0
    return pins and WINDOWS
