"""CatVTON in 8 bits: error, memory, LoRA on top, offload, every way in, on any ComfyUI."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import per_channel
from frugal.kernels.tryon import precision
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.tryon import load_run, quantized_layers
from frugal.tests.helpers import dynamic_vram
from frugal.tests.helpers import tryon as bed

# Of one forward against the same weights in floats: int8 as the issue asks; e4m3 has 3 bits.
LIMITS = {"int8": 2.5e-2, "fp8": 8e-2}
ATTN = "diffusion_model.input_blocks.5.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.3.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def tuned():
    unet = bed.skip_cross_attention(bed.make_unet(0))
    unet.load_state_dict({n: t.half().float() for n, t in unet.state_dict().items()})
    return unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tuned):
    root = tmp_path_factory.mktemp("catvton")
    weights = {n: t.half() for n, t in bed.state(tuned).items()}
    merged = {n: t for n, t in weights.items() if ".attn2." not in n}
    save_file(merged, root / "merged.safetensors", bed.META)
    save_file({n: t.bfloat16() for n, t in merged.items()}, root / "bf16.safetensors", bed.META)
    save_file(weights, root / "base.safetensors", bed.META)
    return root


def load(folder, kind, name="merged.safetensors", dtype="auto", attention=None):
    return load_run.load_catvton(str(folder / name), attention, dtype, kind)


@pytest.fixture(scope="module")
def plain(folder):
    return load(folder, "as stored", dtype="fp32")


def decoded(patcher, key):
    weight = comfy.utils.get_attr(patcher.model, key)
    return weight.dequantize() if quantized_layers.is_quantised(weight) else weight


@pytest.mark.parametrize("kind", LIMITS)
def test_error_of_a_forward_and_bytes_held(folder, plain, tuned, kind):
    patcher = load(folder, kind)
    x, t = bed.inputs()
    want = bed.forward(tuned, x, t)
    error = bed.relative(bed.run(patcher, x, t), want)
    assert 1e-3 < error <= LIMITS[kind]
    # 8-bit weights are what computed that: the float model is far closer.
    assert bed.relative(bed.run(plain, x, t), want) < 1e-5
    # A 1 x 1 convolution or a time projection is as large as the rest here, unlike at full size.
    named = dict(patcher.model.diffusion_model.named_parameters())
    large = {n: p for n, p in named.items() if quantized_layers.is_quantised(p)}
    assert len(large) == 56 and sum(p.ndim == 4 for p in large.values()) == 26
    halves = {n: p.numel() * 2 for n, p in named.items()}
    held = {
        n: sum(t.nbytes for t in quantized_layers.stored_tensors(p).values())
        for n, p in large.items()
    }
    assert sum(held.values()) <= 0.52 * sum(halves[n] for n in large)
    rest = sum(p.nbytes for n, p in named.items() if n not in large)
    # The patcher counts the declarations too, a few bytes a layer.
    counted = patcher.model_size()
    buffers = sum(b.nbytes for b in patcher.model.buffers())
    assert sum(held.values()) + rest <= counted <= sum(held.values()) + rest + buffers + 56 * 100
    assert patcher.attachments[REPORT_KEY].formats == load_run.weight_bytes(
        patcher.model.diffusion_model
    )
    assert "26 convolutions in 8 bits" in patcher.attachments[REPORT_KEY].text()


def test_each_convolution_and_matrix_is_the_rounded_weight(folder, plain):
    patcher = load(folder, "int8")
    for name, module in patcher.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not quantized_layers.is_quantised(weight):
            continue
        layer = quantized_layers.layer_of(module)
        source = comfy.utils.get_attr(plain.model.diffusion_model, f"{name}.weight")
        q, s = per_channel.encode(source, "int8", rotation=layer.rotation)
        assert torch.equal(quantized_layers.stored_tensors(weight)["weight"], q)
        assert torch.equal(
            quantized_layers.stored_tensors(weight)["weight_scale"].reshape(s.shape), s
        )
        assert layer.rotation == (64 if layer.ndim == 2 else 0)


def test_the_attention_file_is_quantised_with_the_rest(folder, tmp_path, tuned):
    path = tmp_path / "attention.safetensors"
    other = bed.make_unet(1)
    save_file(bed.attention_tensors(other), path)
    patcher = load(folder, "int8", "base.safetensors", attention=str(path))
    reference = bed.skip_cross_attention(bed.make_unet(0))
    reference.load_state_dict(
        {n: other.state_dict()[n] if ".attn1." in n else t for n, t in tuned.state_dict().items()}
    )
    assert quantized_layers.is_quantised(comfy.utils.get_attr(patcher.model, ATTN))
    x, t = bed.inputs()
    assert bed.relative(bed.run(patcher, x, t), bed.forward(reference, x, t)) <= 2.5e-2
    assert bed.relative(bed.run(patcher, x, t), bed.forward(tuned, x, t)) > 0.1


def test_float_sources_of_any_width_give_the_same_layers(folder, tmp_path, plain):
    merged, _ = load_run.read_file(str(folder / "merged.safetensors"))
    save_file({n: t.float() for n, t in merged.items()}, tmp_path / "a.safetensors", bed.META)
    half = load(folder, "int8")
    wide = load_run.load_catvton(str(tmp_path / "a.safetensors"), None, "auto", "int8")
    for key in (ATTN, CONV):
        assert torch.equal(decoded(half, key), decoded(wide, key))
    x, t = bed.inputs()
    bf16 = load(folder, "int8", "bf16.safetensors")
    assert bed.relative(bed.run(bf16, x, t), bed.run(plain, x, t)) < 4e-2
    torch_file = {n: t.clone() for n, t in merged.items()} | {"num_heads": torch.tensor(0)}
    del torch_file["num_heads"]
    torch.save(torch_file, tmp_path / "a.pt")
    # A torch file has no metadata, so it is read with 8 heads: the layers are the same.
    other = load_run.load_catvton(str(tmp_path / "a.pt"), None, "auto", "int8")
    assert torch.equal(decoded(other, CONV), decoded(half, CONV))


def patches(patcher, scale=0.02):
    g = torch.Generator().manual_seed(4)
    return {
        key: ("diff", (scale * torch.randn(decoded(patcher, key).shape, generator=g),))
        for key in (ATTN, CONV)
    }


@pytest.mark.parametrize("kind", LIMITS)
def test_a_lora_adds_no_more_than_the_layers_own_error_and_comes_off(folder, plain, kind):
    patcher = load(folder, kind)
    x, t = bed.inputs()
    before = bed.run(patcher, x, t)
    stored = {n: t.clone() for n, t in patcher.model.diffusion_model.state_dict().items()}
    own, floats = patcher.clone(), plain.clone()
    for clone in (own, floats):
        assert len(clone.add_patches(patches(plain))) == 2
    want = bed.run(floats, x, t)
    assert bed.relative(want, bed.run(plain, x, t)) > 0.1
    patched = bed.run(own, x, t)
    assert bed.relative(patched, want) <= LIMITS[kind]
    for key in (ATTN, CONV):
        assert quantized_layers.is_quantised(comfy.utils.get_attr(own.model, key))
        changed = decoded(plain, key) + patches(plain)[key][1][0]
        assert bed.relative(decoded(own, key).float(), changed) < 5e-2
    assert torch.equal(bed.run(patcher, x, t), before)
    after = patcher.model.diffusion_model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in stored.items())


@pytest.mark.parametrize("kind", LIMITS)
def test_a_small_lora_survives_rounding_on_average(folder, kind):
    patcher = load(folder, kind)
    shape = decoded(patcher, CONV).shape
    before = decoded(patcher, CONV).float().clone()
    # A third of an int8 step: rounded to the nearest value it would leave nothing.
    step = float(before.abs().amax()) / 127 / 3
    own = patcher.clone()
    own.add_patches({CONV: ("diff", (torch.full(shape, step),))})
    comfy.model_management.load_models_gpu([own])
    change = (decoded(own, CONV).float() - before).mean()
    own.detach()
    assert 0.8 * step < float(change) < 1.2 * step


@pytest.mark.parametrize("kind", LIMITS)
def test_layers_left_behind_by_a_small_memory_budget_compute_the_same(folder, kind):
    patcher = load(folder, kind)
    x, t = bed.inputs()
    want = bed.run(patcher, x, t)
    comfy.model_management.unload_all_models()
    with_lora = patcher.clone()
    with_lora.add_patches(patches(patcher))
    full = bed.run(with_lora, x, t)
    comfy.model_management.unload_all_models()
    for clone, expected, limit in ((patcher, want, 0.0), (with_lora, full, LIMITS[kind])):
        # One byte of budget: every layer stays where it is and is cast when it runs.
        clone.patch_model(device_to=clone.load_device, lowvram_model_memory=1)
        assert clone.model.model_lowvram
        with torch.no_grad():
            made = clone.model.diffusion_model(x, t, context=None)
        clone.unpatch_model(clone.offload_device)
        assert bed.relative(made, expected) <= limit
    assert torch.equal(bed.run(patcher, x, t), want)


def test_hooks_that_change_weights_in_place_are_refused(folder):
    patcher = load(folder, "int8")
    conv = comfy.utils.get_attr(patcher.model, CONV.removesuffix(".weight"))
    with pytest.raises(FrugalError, match="a hook changes quantised weights"):
        conv.set_weight(torch.zeros(conv.weight.shape), inplace_update=True)


def test_a_lora_file_finds_quantised_convolutions_and_matrices(folder, plain):
    """Through ComfyUI's own loader, in the names that training tools write."""
    lora, g = {}, torch.Generator().manual_seed(6)
    names = (
        ("lora_unet_down_blocks_1_resnets_0_conv1", (128, 64, 3, 3)),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q", (192, 192)),
    )
    for name, shape in names:
        ends = shape[2:]
        lora[f"{name}.lora_down.weight"] = 0.2 * torch.randn((4, shape[1], *ends), generator=g)
        lora[f"{name}.lora_up.weight"] = 0.2 * torch.randn(
            (shape[0], 4, *[1] * len(ends)), generator=g
        )
    made = {}
    x, t = bed.inputs()
    for label, patcher in (("int8", load(folder, "int8")), ("plain", plain)):
        model, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        assert set(model.patches) == {ATTN, CONV}
        made[label] = bed.run(model, x, t)
    assert bed.relative(made["int8"], made["plain"]) <= 2.5e-2
    assert bed.relative(made["plain"], bed.run(plain, x, t)) > 0.1


def test_a_layer_survives_being_gathered_into_one_buffer(folder):
    """How newer ComfyUI versions stream a layer to the device: bytes in a buffer, read back."""
    memory = pytest.importorskip("comfy.memory_management")
    patcher = load(folder, "int8")
    conv = comfy.utils.get_attr(patcher.model, CONV.removesuffix(".weight"))
    parts = [conv.weight, conv.bias]
    buffer = torch.zeros(memory.vram_aligned_size(parts), dtype=torch.uint8)
    weight, bias = memory.interpret_gathered_like(parts, buffer)
    weight.copy_(conv.weight.data)
    bias.copy_(conv.bias.data)
    assert torch.equal(weight.dequantize(), conv.weight.dequantize())
    assert torch.equal(bias, conv.bias)
    # And with a LoRA: rounded again in the layer's own way.
    again = weight.requantize_from_float(
        weight.dequantize() * 2, scale="recalculate", stochastic_rounding=3
    )
    assert bed.relative(again.dequantize(), 2 * conv.weight.dequantize()) < 1e-2
    weight.copy_(again)
    assert torch.equal(weight.dequantize(), again.dequantize())


def test_half_precision_inputs_stay_half(folder, plain):
    patcher = load(folder, "int8", dtype="bf16")
    conv = comfy.utils.get_attr(patcher.model, CONV.removesuffix(".weight"))
    assert isinstance(conv, quantized_layers.WeightOnlyConv2d) and conv.bias.dtype == torch.bfloat16
    x = torch.randn(1, conv.in_channels, 6, 6, generator=torch.Generator().manual_seed(1))
    source = comfy.utils.get_attr(plain.model, CONV.removesuffix(".weight"))
    with torch.no_grad():
        want = source(x)
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-2)):
        with torch.no_grad():
            made = conv(x.to(dtype))
        assert made.dtype == dtype and bed.relative(made.float(), want) < limit


def test_nothing_is_logged_step_after_step(folder, caplog):
    patcher = load(folder, "int8")
    x, t = bed.inputs()
    bed.run(patcher, x, t)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        with torch.no_grad():
            patcher.model.diffusion_model(x, t, context=None)
    assert not caplog.records


def test_memory_is_given_back(folder):
    patcher = load(folder, "int8")
    bed.run(patcher, *bed.inputs())
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.loaded_models()
    assert quantized_layers.is_quantised(comfy.utils.get_attr(patcher.model, CONV))


def test_sources_that_are_no_floats_are_refused(folder, tmp_path):
    merged, _ = load_run.read_file(str(folder / "merged.safetensors"))
    small = {n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in merged.items()}
    save_file(small, tmp_path / "fp8.safetensors", bed.META)
    with pytest.raises(FrugalError, match="weights in float8_e4m3fn"):
        load_run.load_catvton(str(tmp_path / "fp8.safetensors"), None, "auto", "int8")
    with pytest.raises(FrugalError, match="the choice 'int4'"):
        load(folder, "int4")


def test_a_model_without_large_layers_says_that_nothing_was_done(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "SMALLEST", 1 << 20)
    small = bed.make_unet(0, widths=(32, 32, 32))
    save_file(bed.state(small), tmp_path / "small.safetensors", bed.META)
    patcher = load_run.load_catvton(str(tmp_path / "small.safetensors"), None, "auto", "int8")
    assert "no layer is large enough" in patcher.attachments[REPORT_KEY].text()
    assert patcher.model.get_dtype() == torch.float32


def test_reload_factory_quantises_again(folder):
    patcher = load(folder, "int8")
    if getattr(patcher, "cached_patcher_init", None) is None:
        pytest.skip("this ComfyUI has no reload factories")
    make, given = patcher.cached_patcher_init[:2]
    x, t = bed.inputs()
    again = make(*given, disable_dynamic=True)
    assert torch.equal(bed.run(again, x, t), bed.run(patcher, x, t))


@pytest.mark.parametrize("kind", LIMITS)
def test_layers_that_get_their_tensors_late_keep_their_biases(folder, kind):
    """With dynamic VRAM a linear layer of ComfyUI's has no bias before a state dict comes."""
    want = load(folder, kind)
    with dynamic_vram.lazy_layers():
        made = load(folder, kind)
    theirs = want.model.diffusion_model.state_dict()
    ours = made.model.diffusion_model.state_dict()
    assert theirs.keys() == ours.keys() and any(name.endswith("0.bias") for name in ours)
    x, t = bed.inputs()
    assert torch.equal(bed.run(made, x, t), bed.run(want, x, t))


@pytest.mark.parametrize("kind", LIMITS)
def test_a_lora_gives_one_picture_in_every_run_with_dynamic_vram(folder, plain, kind):
    patcher, floats = load(folder, kind), plain.clone()
    floats.add_patches(patches(plain))
    x, t = bed.inputs()
    want = bed.run(floats, x, t)
    patcher.add_patches(patches(plain))
    made = {}
    for resident in (True, False):
        with torch.no_grad(), dynamic_vram.streamed(patcher, resident):
            runs = [patcher.model.diffusion_model(x, t, context=None) for _ in range(3)]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
        made[resident] = runs[0]
    assert torch.equal(made[True], made[False])
    assert bed.relative(made[True], want) <= LIMITS[kind]
    assert bed.relative(made[True], bed.run(load(folder, kind), x, t)) > 0.1
