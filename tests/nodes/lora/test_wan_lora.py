"""LoRA files through ComfyUI's own loader on every quantised layout.

A merged LoRA is rounded to the layout again. What that may cost is what the layout's own rounding
of (stored weight + LoRA) costs, computed here layer by layer with another seed; taking the LoRA out
restores every stored byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.quant_ops
import comfy.sd
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.on_load import AS_STORED, TARGETS
from frugal.nodes.wan import load_run, packed_int
from frugal.tests.helpers import dynamic_vram
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.native_formats import NATIVE, native_file
from frugal.tests.helpers.wan_checks import forward, loaded_weights, reference

SOURCE = bed.weights()
LAYERS = bed.block_linears(SOURCE)
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
# Two seeds of the same random rounding differ by little over so many values; by most where a few
# large ones make up the error.
MARGIN = 1.1


def layouts() -> dict[str, tuple[Callable[[], bed.File], str]]:
    """Label -> (maker of the file, what it is quantised to while loading)."""
    plain = ("fp32", "fp16", "bf16")
    made = {k: v for k, v in bed.fp8_layouts(SOURCE).items() if k not in plain}
    made["int8 per row, bare"] = lambda: bed.int8_rows(SOURCE)
    made |= {
        label: partial(native_file, label, SOURCE, LAYERS, header=False)
        for label in NATIVE
        if label != "W4A8, groups of 16"
    }
    made["NVFP4, LightX2V"] = lambda: bed.lightx2v_nvfp4(SOURCE)
    for label, options in bed.PACKED_LAYOUTS.items():
        made[label] = lambda options=options: bed.gptq_or_awq(SOURCE, **options)
    made["awq_w4a16"] = lambda: bed.w4a16(SOURCE)
    found = {label: (make, AS_STORED) for label, make in made.items()}
    for target in TARGETS:
        found[f"quantised to {target}"] = (lambda: (SOURCE, {}, {}), target)
    return found


LAYOUTS = layouts()


def stored(patcher) -> dict[str, torch.Tensor]:
    """Every tensor behind the quantised weights."""
    found = {}
    for name in LAYERS:
        weight = patcher.model.diffusion_model.get_submodule(name).weight
        inner, _ = weight.__tensor_flatten__()
        found |= {f"{name} {part}": getattr(weight, part) for part in inner}
    return {name: tensor.clone() for name, tensor in found.items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.shape == b.shape and torch.equal(*raw)


def _check_rounding(patched, merged, wanted, meant) -> None:
    """Each merged weight is as far from the exact one as rounding to the layer's format."""
    for name in LAYERS:
        key = f"{name}.weight"
        module = patched.model.diffusion_model.get_submodule(name)
        again = module.set_weight(wanted[key].clone(), seed=7, return_weight=True)
        bound = bed.relative(again.dequantize().float(), wanted[key])
        error = bed.relative(merged[key], wanted[key])
        assert error <= MARGIN * bound, f"{name}: {error:.4f} against {bound:.4f}"
        assert not torch.equal(merged[key], meant[key]), name


@pytest.mark.parametrize("label", LAYOUTS)
def test_lora_costs_what_rounding_costs_and_leaves_no_trace(label, tmp_path):
    make, target = LAYOUTS[label]
    path = bed.write(tmp_path / "wan.safetensors", *make()[:2])
    with torch.inference_mode():
        try:
            model = load_run.load_wan(path, quantize=target)[0]
        except FrugalError as error:
            # Only a format that this ComfyUI does not know may stop the load.
            assert "unknown to this ComfyUI" in str(error)
            assert not any(form in KNOWN for form, *_ in NATIVE.values())
            return
        meant, before, bytes_before = loaded_weights(model), forward(model), stored(model)
        lora, wanted = bed.lora_of(meant)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        assert len(patched.patches) == len(LAYERS)
        patched.patch_model(torch.device("cpu"))
        if packed_int.is_packed(patched.model.diffusion_model.get_submodule(LAYERS[0]).weight):
            # Few bits are kept as they are, and the change is made where they are unpacked.
            kept, merged = stored(patched), wanted
            assert all(same_bytes(kept[key], bytes_before[key]) for key in bytes_before)
        else:
            merged = loaded_weights(patched)
            _check_rounding(patched, merged, wanted, meant)
        # The layers run with what they hold, as exactly as they do without a LoRA.
        kernels = bed.relative(before, reference(meant))
        assert bed.relative(forward(patched), reference(merged)) <= 1.5 * kernels + 1e-4
        patched.unpatch_model(torch.device("cpu"))
        after = stored(model)
        assert after.keys() == bytes_before.keys()
        assert all(same_bytes(after[key], bytes_before[key]) for key in after)
        assert torch.equal(forward(model), before)


@pytest.mark.parametrize("label", LAYOUTS)
def test_every_run_gives_the_same_with_dynamic_vram(label, tmp_path):
    """Whether a layer stays on the device, where its patched weight is rounded, or is streamed."""
    make, target = LAYOUTS[label]
    path = bed.write(tmp_path / "wan.safetensors", *make()[:2])
    dynamic_vram.needed()
    with torch.inference_mode():
        model = load_run.load_wan(path, quantize=target)[0]
        before = forward(model)
        lora, _ = bed.lora_of(loaded_weights(model))
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        made = []
        for resident in (True, False):
            with dynamic_vram.streamed(patched, resident):
                made += [forward(patched) for _ in range(3)]
    assert all(torch.equal(each, made[0]) for each in made)
    assert bed.relative(made[0], before) > 1e-3
