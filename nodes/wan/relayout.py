"""Another layout for a loaded weight: the same tensors, other code."""

from __future__ import annotations

from typing import Any

import comfy.quant_ops
import torch


def relayout(module: Any, name: str) -> None:
    """Let a loaded layer's quantised weight be run by the registered layout `name`, which takes the
    tensors and parameters of the weight's own.
    """
    weight = module.weight
    made = comfy.quant_ops.QuantizedTensor(weight._qdata, name, weight._params)
    module.layout_type = name
    module.weight = torch.nn.Parameter(made, requires_grad=False)
