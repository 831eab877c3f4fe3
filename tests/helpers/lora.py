"""LoRA files for the tiny Wan models of wan_bed, and the outputs of models that carry them."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import torch
from safetensors.torch import save_file

from frugal.kernels.checkpoints.wan_shapes import parameters
from frugal.nodes.lora import apply, file
from frugal.tests.helpers import wan as bed

SOURCE = bed.weights()
RANK = 4
SIGMA = 0.6


def linears(config=bed.T2V) -> list[str]:
    """Every linear layer of the model, in and outside the blocks."""
    return [name[:-7] for name, entry in parameters(config).items() if entry.linear]


def factors(shape, seed, rank=RANK):
    """(up [out, r], down [r, in]) whose product is about as large as a weight of the bed."""
    make = torch.Generator().manual_seed(seed)
    rows, width = shape
    return (
        torch.randn(rows, rank, generator=make) / rank**0.5,
        torch.randn(rank, width, generator=make) / width**0.5,
    )


def lora(layers, seed=1, alpha=None, source=SOURCE):
    """(file with diffusion_model. names, {layer: dense change [out, in]})."""
    tensors, dense = {}, {}
    for number, layer in enumerate(layers):
        up, down = factors(source[f"{layer}.weight"].shape, 1000 * seed + number)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
        dense[layer] = up @ down * (1 if alpha is None else alpha / RANK)
        if alpha is not None:
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors, dense


def with_changes(weights, *changes):
    """float32 weights with each (dense changes, strength) added."""
    changed = {name: tensor.float().clone() for name, tensor in weights.items()}
    for dense, strength in changes:
        for layer, change in dense.items():
            changed[f"{layer}.weight"] += strength * change
    return changed


def put(patcher, folder, tensors, strength=1.0, name="lora.safetensors"):
    """(model, report) with the tensors written as a LoRA file and added."""
    path = folder / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return apply.apply(patcher, file.read(path, patcher.model), strength)


def output(patcher, config=bed.T2V, batch=1):
    """What the network itself gives for the bed's inputs, loaded and called as a sampler does."""
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models)
    return run(patcher, config, batch)


def run(patcher, config=bed.T2V, batch=1):
    device = patcher.load_device
    given = {
        key: value.to(device) if torch.is_tensor(value) else value
        for key, value in bed.inputs(config).items()
    }
    x = given["x"].repeat(batch, 1, 1, 1, 1)
    noisy = x[:, :16]
    more = {
        key: given[key] for key in ("clip_fea", "vace_context", "vace_strength") if key in given
    }
    found = patcher.model.apply_model(
        noisy,
        torch.tensor([SIGMA], device=device),
        c_concat=x[:, 16:] if config.image else None,
        c_crossattn=given["context"].repeat(batch, 1, 1),
        transformer_options={"wrappers": patcher.wrappers},
        **more,
    )
    return ((noisy - found) / SIGMA).cpu()


def reference(weights, config=bed.T2V):
    """The same output of ComfyUI's own fp32 model that holds these weights."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.float() for name, tensor in weights.items()},
        model_options={"dtype": torch.float32},
    )
    return output(patcher, config)
