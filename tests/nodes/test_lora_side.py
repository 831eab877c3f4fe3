"""LoRAs beside the layers of a loaded model: exact, stackable, gone without a trace."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.checkpoints.wan_shapes import parameters
from frugal.nodes.quantize import lora_apply, lora_file
from frugal.nodes.wan import glue
from frugal.tests import wan_bed as bed

SOURCE = bed.weights()
LINEARS = [name[:-7] for name, entry in parameters(bed.T2V).items() if entry.linear]
RANK = 4


def factors(shape, seed, rank=RANK):
    """(up [out, r], down [r, in]) whose product is about as large as a weight of the bed."""
    make = torch.Generator().manual_seed(seed)
    rows, width = shape
    return (
        torch.randn(rows, rank, generator=make) / rank**0.5,
        torch.randn(rank, width, generator=make) / width**0.5,
    )


def lora(layers, seed=1, alpha=None):
    """(file with diffusion_model. names, {layer: dense change [out, in]})."""
    tensors, dense = {}, {}
    for number, layer in enumerate(layers):
        up, down = factors(SOURCE[f"{layer}.weight"].shape, 1000 * seed + number)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
        dense[layer] = up @ down * (1 if alpha is None else alpha / RANK)
        if alpha is not None:
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors, dense


def with_changes(weights, *changes):
    """Weights with each (dense changes, strength) added."""
    changed = {name: tensor.float().clone() for name, tensor in weights.items()}
    for dense, strength in changes:
        for layer, change in dense.items():
            changed[f"{layer}.weight"] += strength * change
    return changed


def put(patcher, folder, tensors, strength=1.0, name="lora.safetensors"):
    path = folder / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return lora_apply.apply(patcher, lora_file.read(path, patcher.model), strength)


def output(patcher, config=bed.T2V, batch=1):
    """What the network itself gives for the bed's inputs, through ComfyUI's own call of it."""
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models)
    return run(patcher, config, batch)


def run(patcher, config=bed.T2V, batch=1):
    given = bed.inputs(config)
    x = given["x"].repeat(batch, 1, 1, 1, 1)
    noisy = x[:, :16]
    sigma = torch.tensor([0.6])
    found = patcher.model.apply_model(
        noisy,
        sigma,
        c_concat=x[:, 16:] if config.image else None,
        c_crossattn=given["context"].repeat(batch, 1, 1),
        transformer_options={"wrappers": patcher.wrappers},
        **{key: given[key] for key in ("clip_fea",) if key in given},
    )
    return (noisy - found) / 0.6


def reference(weights, config=bed.T2V):
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.float() for name, tensor in weights.items()},
        model_options={"dtype": torch.float32},
    )
    return output(patcher, config)


def load(path, quantize=glue.AS_STORED):
    return glue.load_wan(path, quantize=quantize)[0]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def fp32(tmp_path):
    return load(bed.write(tmp_path / "fp32.safetensors", SOURCE))


def test_three_stacked_loras_equal_the_dense_sum(fp32, tmp_path):
    before = output(fp32)
    parts = [lora(LINEARS, 1), lora(LINEARS[:9], 2, alpha=2), lora(LINEARS[5:], 3)]
    strengths = (1.0, -0.7, 0.35)
    stacked = [fp32]
    for (tensors, _), strength in zip(parts, strengths, strict=True):
        stacked.append(put(stacked[-1], tmp_path, tensors, strength)[0])
    wanted = reference(
        with_changes(SOURCE, *[(dense, s) for (_, dense), s in zip(parts, strengths, strict=True)])
    )
    assert bed.relative(before, wanted) > 0.1
    assert bed.relative(output(stacked[3]), wanted) <= 1e-5
    third = reference(with_changes(SOURCE, (parts[0][1], 1.0)))
    assert bed.relative(output(stacked[1]), third) <= 1e-5
    assert torch.equal(output(fp32), before)
