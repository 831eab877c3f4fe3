"""Layers that take the tensors of a mapped file as they are, instead of a copy of them.

Where ComfyUI loads a model without its own dynamic loading, it copies every weight into memory that
it set aside before. With these layers, which go in through its `custom_operations` option, a linear
weight of the right type stays in the file's mapping: no memory of its own, read when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable

import comfy.cli_args
import comfy.ops
import comfy.utils
import torch

from .._memory import pinning_may_fail


def dynamic() -> bool:
    """Whether ComfyUI's dynamic loading is on, which maps files in its own way."""
    return getattr(getattr(comfy, "memory_management", None), "aimdo_enabled", False)


def useful() -> bool:
    """Whether the running ComfyUI would copy, was not asked for operations of its own, and can keep
    weights in a file's mapping.
    """
    # Dynamic loading's mappings must not be written to.
    return not dynamic() and not comfy.cli_args.args.fast and not pinning_may_fail()


def reads(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether ComfyUI's reader knows all these types. That of its dynamic loading goes by a table
    of its own, in which MXFP8's float8_e8m0fnu may be missing; without dynamic loading the
    safetensors library reads.
    """
    table = getattr(comfy.utils, "_TYPES", None)
    return not dynamic() or table is None or set(dtypes) <= set(table.values())


class MappedOps(comfy.ops.manual_cast):
    """ComfyUI's casting layers; only the way a linear layer takes its weight differs."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            held, given = self.weight, state_dict.get(f"{prefix}weight")
            same = (
                given is not None
                and given.dtype == held.dtype
                and given.device == held.device
                and given.shape == held.shape
            )
            bias = state_dict.get(f"{prefix}bias")
            if same and bias is not None and self.bias is not None:
                state_dict[f"{prefix}bias"] = bias.to(self.bias.dtype)
            # torch's own switch for taking tensors over; it would take another type over too.
            metadata = {**local_metadata, "assign_to_params_buffers": same}
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
