"""Unmerged LoRAs on a loaded model: exact, stackable, gone without a trace."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from frugal.nodes.lora import unmerged_run
from frugal.nodes.wan import load_run
from frugal.tests.helpers import gguf
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.lora import (  # fmt: skip
    SOURCE,
    linears,
    lora,
    output,
    put,
    reference,
    run,
    with_changes,
)
from frugal.tests.helpers.wan_checks import loaded_weights

pytestmark = pytest.mark.usefixtures("inference")
LINEARS = linears()
EXACT = 1e-5
INT8 = "int8_tensorwise" in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def load(path, quantize=load_run.AS_STORED):
    return load_run.load_wan(path, quantize=quantize)[0]


def has_own_forward(patcher) -> list[str]:
    return [name for name, m in patcher.model.named_modules() if "forward" in m.__dict__]


def test_three_stacked_loras_equal_the_dense_sum(fp32, tmp_path):
    before = output(fp32)
    parts = [lora(LINEARS, 1), lora(LINEARS[:9], 2, alpha=2), lora(LINEARS[5:], 3)]
    strengths = (1.0, -0.7, 0.35)
    stacked = [fp32]
    for (tensors, _), strength in zip(parts, strengths, strict=True):
        stacked.append(put(stacked[-1], tmp_path, tensors, strength)[0])
    changes = [(dense, strength) for (_, dense), strength in zip(parts, strengths, strict=True)]
    wanted = reference(with_changes(SOURCE, *changes))
    assert bed.relative(before, wanted) > 0.1
    assert bed.relative(output(stacked[3]), wanted) <= EXACT
    assert bed.relative(output(stacked[1]), reference(with_changes(SOURCE, changes[0]))) <= EXACT
    assert torch.equal(output(fp32), before)
    backwards = fp32
    for (tensors, _), strength in list(zip(parts, strengths, strict=True))[::-1]:
        backwards = put(backwards, tmp_path, tensors, strength)[0]
    assert bed.relative(output(backwards), wanted) <= EXACT


def test_nothing_is_left_behind(fp32, tmp_path):
    before = output(fp32)
    held = {name: tensor.clone() for name, tensor in loaded_weights(fp32).items()}
    tensors, _ = lora(LINEARS)
    changed = put(fp32, tmp_path, tensors)[0]
    none = put(fp32, tmp_path, tensors, 0.0)[0]
    first = output(changed)
    assert bed.relative(first, before) > 0.1
    assert torch.equal(output(none), before) and torch.equal(output(fp32), before)
    assert torch.equal(output(changed), first)

    def cancelled(*_, **__):
        raise KeyboardInterrupt

    changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", cancelled)
    with pytest.raises(KeyboardInterrupt):
        run(changed)
    assert has_own_forward(changed) == []
    assert all(torch.equal(value, held[name]) for name, value in loaded_weights(fp32).items())
    assert torch.equal(output(fp32), before)


def test_clones_do_not_see_each_other(fp32, tmp_path):
    (one, dense_one), (two, dense_two) = lora(LINEARS[:12], 1), lora(LINEARS[8:], 2)
    base = put(fp32, tmp_path, lora(LINEARS[3:5], 3)[0])[0]
    alone = output(base)
    left, right = put(base, tmp_path, one)[0], put(base, tmp_path, two, 0.5)[0]
    shared = (lora(LINEARS[3:5], 3)[1], 1.0)
    wanted = [
        reference(with_changes(SOURCE, shared, change))
        for change in ((dense_one, 1.0), (dense_two, 0.5))
    ]
    for _ in range(2):
        assert bed.relative(output(left), wanted[0]) <= EXACT
        assert bed.relative(output(right.clone()), wanted[1]) <= EXACT
    assert torch.equal(output(base), alone)


def test_another_strength_keeps_the_model_loaded(fp32, tmp_path):
    tensors, dense = lora(LINEARS)
    first = put(fp32, tmp_path, tensors, 1.0)[0]
    output(first)
    second = put(fp32, tmp_path, tensors, 0.25)[0]
    assert first.patches_uuid == second.patches_uuid == fp32.patches_uuid
    weights = [parameter.data_ptr() for parameter in fp32.model.parameters()]
    loaded = fp32.model.model_loaded_weight_memory
    found = output(second)
    assert bed.relative(found, reference(with_changes(SOURCE, (dense, 0.25)))) <= EXACT
    assert weights == [parameter.data_ptr() for parameter in fp32.model.parameters()]
    assert fp32.model.model_loaded_weight_memory == loaded > 0


def test_what_branches_hold_is_counted(fp32, tmp_path):
    tensors, _ = lora(LINEARS)
    changed, report = put(fp32, tmp_path, tensors)
    changed = put(changed, tmp_path, tensors)[0].clone()
    held = changed.get_nested_additional_models()
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert [patcher.model_size() for patcher in held] == [size, size] and report.size == size
    output(changed)
    loaded = comfy.model_management.loaded_models()
    assert all(any(patcher.is_clone(each) for each in loaded) for patcher in held)


@pytest.mark.parametrize("config", [bed.I2V, bed.VACE], ids=["I2V", "VACE"])
def test_every_linear_layer_of_other_variants(config, tmp_path):
    source = bed.weights(config)
    patcher = load(bed.write(tmp_path / "wan.safetensors", source))
    tensors, dense = lora(linears(config), source=source)
    changed, report = put(patcher, tmp_path, tensors)
    assert (report.layers, report.left) == (len(linears(config)), {})
    wanted = reference(with_changes(source, (dense, 1.0)), config)
    assert bed.relative(output(patcher, config), wanted) > 0.1
    assert bed.relative(output(changed, config), wanted) <= EXACT


def test_each_layer_by_itself(fp32, tmp_path):
    before = output(fp32)
    for layer in LINEARS:
        tensors, dense = lora([layer])
        wanted = reference(with_changes(SOURCE, (dense, 1.0)))
        assert bed.relative(before, wanted) > 100 * EXACT, layer
        assert bed.relative(output(put(fp32, tmp_path, tensors)[0]), wanted) <= EXACT, layer


FORMATS = {
    "bf16": lambda: (*bed.base(SOURCE)[:1], {}, bed.base(SOURCE)[1]),
    "fp8 cast": lambda: bed.plain_fp8(SOURCE, bed.E4),
    "fp8 scaled": lambda: bed.scaled(SOURCE, bed.E4, marker=torch.zeros(2).to(bed.E4)),
    "fp8 for each row": lambda: bed.scaled(SOURCE, bed.E4, rows=True, **bed.ONE_STEP),
    "GPTQ": lambda: bed.gptq_or_awq(SOURCE, act_order=True),
    "AWQ": lambda: bed.gptq_or_awq(SOURCE, kind="awq"),
}


@pytest.mark.parametrize("label", FORMATS)
def test_exact_on_the_dequantised_weights(label, tmp_path):
    tensors, metadata, meant = FORMATS[label]()
    patcher = load(bed.write(tmp_path / "wan.safetensors", tensors, metadata))
    before = output(patcher)
    (one, dense_one), (two, dense_two) = lora(LINEARS, 1), lora(LINEARS, 2)
    changed = put(put(patcher, tmp_path, one, 0.8)[0], tmp_path, two, 0.6)[0]
    wanted = reference(with_changes(meant, (dense_one, 0.8), (dense_two, 0.6)))
    assert bed.relative(before, wanted) > 0.1
    assert bed.relative(output(changed), wanted) <= EXACT
    assert torch.equal(output(patcher), before)


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "wan.gguf"
    gguf.write(path, SOURCE, "Q8_0")
    patcher = load(path)
    tensors, dense = lora(LINEARS)
    wanted = reference(with_changes(loaded_weights(patcher), (dense, 1.0)))
    assert bed.relative(output(put(patcher, tmp_path, tensors)[0]), wanted) <= EXACT


def test_models_of_comfyuis_own_loader(tmp_path):
    tensors, _, meant = FORMATS["fp8 scaled"]()
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    patcher = comfy.sd.load_diffusion_model(str(path))
    meant = loaded_weights(patcher) if "_qdata" in dir(_first(patcher).weight) else meant
    factors, dense = lora(bed.block_linears(SOURCE))
    before = output(patcher)
    after = output(put(patcher, tmp_path, factors)[0])
    # 0.3.75 cuts the other layers of such files to unscaled fp8, so compare what the LoRA changes.
    exact, changed = reference(meant), reference(with_changes(meant, (dense, 1.0)))
    assert bed.relative(after, changed) <= max(EXACT, 1.5 * bed.relative(before, exact))
    assert bed.relative(before, changed) > 5 * bed.relative(after, changed)


def _first(patcher):
    return patcher.model.diffusion_model.blocks[0].ffn[0]


@pytest.mark.skipif(not INT8, reason="this ComfyUI has no int8 layers")
@pytest.mark.parametrize("quantize", ["int8 ConvRot", "W4A8"])
def test_layers_whose_inputs_are_quantised_too(quantize, tmp_path):
    """Here the layer's own product is only near that of its weights, so the change of the output
    is what has to be right; ComfyUI runs ffn.2 of int8 without calling the layer.
    """
    patcher = load(bed.write(tmp_path / "fp32.safetensors", SOURCE), quantize)
    meant = loaded_weights(patcher)
    before, exact = output(patcher), reference(meant)
    for layer in [name for name in bed.block_linears(SOURCE) if "blocks.1." in name]:
        tensors, dense = lora([layer])
        after = output(put(patcher, tmp_path, tensors)[0])
        wanted = reference(with_changes(meant, (dense, 1.0)))
        moved = bed.relative(exact, wanted)
        error = bed.relative(after, wanted)
        assert error <= max(1.3 * bed.relative(before, exact), 0.2 * moved), (layer, error, moved)
    assert torch.equal(output(patcher), before)


@pytest.mark.skipif(not INT8, reason="this ComfyUI has no int8 layers")
def test_fused_feed_forward_is_exact(tmp_path):
    """The branch of ffn.2 against the same made by hand from the parts of the feed-forward."""
    patcher = load(bed.write(tmp_path / "fp32.safetensors", SOURCE), "int8 ConvRot")
    tensors, dense = lora(["blocks.1.ffn.2"])
    ffn = patcher.model.diffusion_model.blocks[1].ffn
    assert unmerged_run.fuses(ffn) and ffn[2].weight._layout_cls == "TensorWiseINT8Layout"
    changed = put(patcher, tmp_path, tensors)[0]
    seen = {}

    def keep(module, args, result):
        seen["x"], seen["out"] = args[0], result.clone()

    hook = ffn.register_forward_hook(keep)
    try:
        output(changed)
    finally:
        hook.remove()
    hidden = torch.nn.functional.gelu(ffn[0](seen["x"]), approximate="tanh")
    wanted = ffn[2](hidden) + hidden @ dense["blocks.1.ffn.2"].t()
    assert bed.relative(seen["out"], wanted) <= EXACT


def test_batches_and_grad_modes(fp32, tmp_path):
    tensors, dense = lora(LINEARS)
    changed = put(fp32, tmp_path, tensors)[0]
    wanted = reference(with_changes(SOURCE, (dense, 1.0)))
    both = output(changed, batch=2)
    assert both.shape[0] == 2
    for one in both:
        assert bed.relative(one[None], wanted) <= EXACT
    with torch.inference_mode(False), torch.no_grad():
        outside = load(tmp_path / "fp32.safetensors")
        changed = put(outside, tmp_path, tensors)[0]
        assert bed.relative(output(changed), wanted) <= EXACT


def test_a_wrapper_that_comes_twice_counts_once(fp32, tmp_path):
    """ComfyUI appends lists of wrappers to each other, for prompts with hooks among others."""
    changed = put(fp32, tmp_path, lora(LINEARS)[0])[0]
    once = output(changed)
    (wrapper,) = changed.get_wrappers(WrappersMP.APPLY_MODEL, unmerged_run.KEY)
    changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, unmerged_run.KEY, wrapper)
    assert torch.equal(output(changed), once)
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        bypass = comfy.sd.load_bypass_lora_for_models
        alone = put(fp32, tmp_path, lora(LINEARS)[0])[0]
        both = [bypass(each, None, lora(LINEARS, 2)[0], 0.5, 0.0)[0] for each in (alone, changed)]
        assert torch.equal(output(both[0]), output(both[1]))


@pytest.mark.parametrize("label", ["fp8 scaled", "GPTQ"])
def test_low_vram(label, tmp_path):
    """Layers and branches that stay in RAM are cast when they run."""
    tensors, metadata, meant = FORMATS[label]()
    patcher = load(bed.write(tmp_path / "wan.safetensors", tensors, metadata))
    factors, dense = lora(LINEARS)
    changed = put(patcher, tmp_path, factors)[0]
    for each in (changed, *changed.get_nested_additional_models()):
        each.patch_model(torch.device("cpu"), lowvram_model_memory=64)
        assert each.model.model_lowvram
    wanted = reference(with_changes(meant, (dense, 1.0)))
    assert bed.relative(run(changed), wanted) <= EXACT
    for each in (changed, *changed.get_nested_additional_models()):
        each.unpatch_model(torch.device("cpu"))


def test_beside_and_under_comfyuis_own_loras(fp32, tmp_path):
    (one, dense_one), (two, dense_two) = lora(LINEARS, 1), lora(LINEARS, 2)
    merged = comfy.sd.load_lora_for_models(fp32, None, one, 0.5, 0.0)[0]
    wanted = reference(with_changes(SOURCE, (dense_one, 0.5), (dense_two, 0.5)))
    assert bed.relative(output(put(merged, tmp_path, two, 0.5)[0]), wanted) <= EXACT
    beside = put(fp32, tmp_path, two, 0.5)[0]
    later = comfy.sd.load_lora_for_models(beside, None, one, 0.5, 0.0)[0]
    assert bed.relative(output(later), wanted) <= EXACT
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        return
    bypassed = comfy.sd.load_bypass_lora_for_models(beside, None, one, 0.5, 0.0)[0]
    assert bed.relative(output(bypassed), wanted) <= EXACT


@pytest.mark.parametrize(
    "quantize", [load_run.AS_STORED, "int8 ConvRot"] if INT8 else [load_run.AS_STORED]
)
@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiled_layers_notice_every_change(compiled_first, quantize, tmp_path):
    """Compiled code is shared by models that differ in their LoRAs only."""
    base = load(bed.write(tmp_path / "fp32.safetensors", SOURCE), quantize)
    files = [lora(["blocks.0.ffn.0", "blocks.0.ffn.2"], seed)[0] for seed in (1, 2)]
    wanted = [output(model) for model in (base, *(put(base, tmp_path, f)[0] for f in files))]
    assert bed.relative(wanted[0], wanted[1]) > 0.01 < bed.relative(wanted[1], wanted[2])
    models = []
    for file in (None, *files):
        model = base.clone()
        if file is not None and not compiled_first:
            model = put(model, tmp_path, file)[0]
        set_torch_compile_wrapper(model, backend="eager", keys=["diffusion_model.blocks.0.ffn"])
        if file is not None and compiled_first:
            model = put(model, tmp_path, file)[0]
        models.append(model)
    torch._dynamo.reset()
    for number in (0, 1, 0, 2, 1, 0):
        assert bed.relative(output(models[number]), wanted[number]) <= EXACT, number
    torch._dynamo.reset()
