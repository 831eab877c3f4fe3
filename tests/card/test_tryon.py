"""CatVTON on the simulated card, as stored and in 8 bit, with and without a LoRA."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from frugal.nodes._comfy import compute_dtype
from frugal.nodes.tryon import load_run
from frugal.tests.helpers import tryon as bed

PATCHED = (
    "diffusion_model.input_blocks.5.1.transformer_blocks.0.attn1.to_q.weight",
    "diffusion_model.input_blocks.3.0.in_layers.2.weight",
)
# Half precision through the whole net; of 8 bits what quantising itself changes.
BOUNDS = {"as stored": 5e-3, "int8": 5e-2, "fp8": 1e-1}


@pytest.fixture(scope="module")
def unet():
    return bed.skip_cross_attention(bed.make_unet(0))


def run(patcher) -> torch.Tensor:
    x, t = bed.inputs()
    comfy.model_management.load_models_gpu([patcher])
    device = patcher.load_device
    with torch.no_grad():
        x = x.to(device, compute_dtype(patcher.model))
        return patcher.model.diffusion_model(x, t.to(device)).float().cpu()


@pytest.mark.parametrize("kind", BOUNDS)
def test_forward(unet, tmp_path, same_as_cpu, kind):
    held = {n: t.half() for n, t in bed.state(unet).items() if ".attn2." not in n}
    save_file(held, tmp_path / "model.safetensors", bed.META)
    plain = load_run.load_catvton(str(tmp_path / "model.safetensors"), None, "auto", kind)
    first, again = run(plain), run(plain)
    assert torch.equal(first, again)
    make = torch.Generator().manual_seed(4)
    shapes = {key: tuple(comfy.utils.get_attr(plain.model, key).shape) for key in PATCHED}
    patched = plain.clone()
    patched.add_patches(
        {k: ("diff", (0.02 * torch.randn(s, generator=make),)) for k, s in shapes.items()}
    )
    changed, changed_again, back = run(patched), run(patched), run(plain)
    assert torch.equal(changed, changed_again), "run 2 with a LoRA differs"
    assert torch.equal(first, back), "the model without the LoRA changed"
    assert not torch.equal(first, changed)
    assert bed.relative(first, bed.forward(unet, *bed.inputs())) < BOUNDS[kind]
    same_as_cpu([first, changed], BOUNDS[kind])
