"""The state of comfy-kitchen, whose kernels ComfyUI multiplies quantised weights with."""

from __future__ import annotations

import sys
from typing import Any

import comfy.quant_ops

from ..kernels.memory.doctor import Backend


def kitchen_backends() -> dict[str, Backend]:
    """Its backends by name; none where this ComfyUI does not use it."""
    # ComfyUI has imported it if it uses it; where it does not, its state means nothing.
    kitchen: Any = sys.modules.get("comfy_kitchen")
    if kitchen is None or not getattr(comfy.quant_ops, "_CK_AVAILABLE", False):
        return {}
    found = {}
    for name, state in kitchen.list_backends().items():
        kernels = {}
        for kernel in state["capabilities"]:
            rule = kitchen.registry.get_constraints(name, kernel)
            least = getattr(rule, "min_compute_capability", None)
            kernels[kernel] = None if least is None else tuple(least)
        found[name] = Backend(
            state["available"], state["disabled"], state["unavailable_reason"], kernels
        )
    return found
