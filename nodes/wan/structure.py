"""What a relative of Wan is made of: the parameters of the class that the running ComfyUI builds
for such a file, without memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_detection
import torch

from ...kernels.checkpoints.packed import WORDS
from ...kernels.checkpoints.wan_shapes import Parameter, WanConfig, parameters
from ..memory.without_memory import META, MetaOps

# What ComfyUI's classes raise for sizes that no model of theirs has.
UNBUILT = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
# What ComfyUI reads the sizes of a model from; formats change the second length of these.
SIZES = ("blocks.0.ffn.0.weight", "head.head.weight")


def structure(
    config: WanConfig, shapes: Mapping[str, tuple[int, ...]], transformer: Mapping[str, Any]
) -> dict[str, Parameter] | None:
    """The parameters of the class that ComfyUI builds for a file of these canonical names and
    shapes; None if it has none. transformer: what the file's metadata say of the model.

    Buffers are among them where the file holds them: the class makes them where it does not.
    """
    held = dict(shapes)
    for name in shapes:
        layer, _, suffix = name.rpartition(".")
        if suffix == WORDS:
            held[f"{layer}.weight"] = shapes[name]
    known = parameters(config)
    held |= {name: known[name].shape for name in SIZES}
    state = {name: torch.empty(shape, device=META) for name, shape in held.items()}
    metadata = {"config": json.dumps({"transformer": dict(transformer)})} if transformer else {}
    try:
        detected = comfy.model_detection.detect_unet_config(state, "", metadata=metadata)
        found = detected and comfy.model_detection.model_config_from_unet_config(detected, state)
        if not found:
            return None
        found.custom_operations = MetaOps
        model = found.get_model(state, "", device=META)
    except UNBUILT:
        return None
    if not isinstance(model, comfy.model_base.WAN21):
        return None
    network = model.diffusion_model
    linears = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    table = {
        name: Parameter(tuple(each.shape), name in linears)
        for name, each in network.named_parameters()
    }
    made = {name: Parameter(tuple(each.shape)) for name, each in network.named_buffers()}
    return table | {name: each for name, each in made.items() if name in shapes}
