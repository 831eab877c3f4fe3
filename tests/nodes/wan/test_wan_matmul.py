"""The precision switch on loaded models: what multiplies, and that nothing else changes."""

from __future__ import annotations

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch

from frugal.kernels import device_types
from frugal.kernels.checkpoints.matmul_precision import AUTO, FULL, LOW
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import fp8_linear as fp8
from frugal.kernels.formats import hardware
from frugal.kernels.memory.doctor import Backend
from frugal.kernels.quantize.on_load import AS_STORED, FP8, INT8_CONVROT, W4A8_NAME
from frugal.nodes.wan import load_run, matmul
from frugal.nodes.wan.load import FrugalLoadWan
from frugal.tests.helpers import rounding
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import check, forward, loaded_weights, reference

SOURCE = bed.weights()
LAYERS = bed.block_linears(SOURCE)
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def load(path, products=AUTO, quantize=AS_STORED):
    with torch.inference_mode():
        return load_run.load_wan(path, "default", quantize, products)


def fp8_file(folder, label="e4m3 weight_scale [rows,1], no marker (LightX2V)"):
    tensors, metadata, meant = bed.fp8_layouts(SOURCE)[label]()
    return bed.write(folder / "wan.safetensors", tensors, metadata), meant


@pytest.fixture
def units(monkeypatch):
    """The CPU passes for a device with fp8 matrix units; it multiplies by the formula."""
    monkeypatch.setattr(matmul, "capability_of", lambda device: (8, 9))
    monkeypatch.setattr(matmul, "choose", lambda device, dtype: ("formula", fp8.reference))


def test_input_is_optional_and_off_by_default():
    inputs = {item.id: item for item in FrugalLoadWan.GET_SCHEMA().inputs}
    assert inputs["matmul"].optional and inputs["matmul"].default == AUTO
    assert list(inputs["matmul"].options) == [AUTO, FULL, LOW]


FP8_LABELS = (
    "e4m3 weight_scale [rows,1], no marker (LightX2V)",
    "e4m3 scale_weight, marker of 2",
    "e5m2 weight_scale, header",
    "e4m3 cast",
)


@pytest.mark.parametrize("label", FP8_LABELS)
def test_fp8_low_precision_is_the_formula_in_every_layer(label, units, tmp_path):
    path, meant = fp8_file(tmp_path, label)
    plain, _ = load(path)
    low, report = load(path, LOW)
    held = loaded_weights(low)
    assert all(bed.relative(held[name], meant[name]) <= 1e-6 for name in meant)
    assert any("with a scale per token and cpu has 8.9" in note for note in report.notes)
    x = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(3)) * 900
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
                layer = low.model.diffusion_model.get_submodule(name)
                tokens, size = fp8.round_tokens(x.reshape(-1, 256))
                rounded = (tokens.float() * size).reshape(x.shape)
                bias = layer.bias.float()
                expected = torch.nn.functional.linear(rounded, meant[f"{name}.weight"], bias)
                assert bed.relative(layer(x), expected) <= 1e-5
            out, exact = forward(low), forward(plain)
            assert 1e-3 < bed.relative(out, exact) < 0.05


def test_low_precision_through_scaled_mm(monkeypatch, tmp_path):
    monkeypatch.setattr(matmul, "capability_of", lambda device: (8, 9))
    try:
        fp8.choose(torch.device("cpu"), torch.float8_e4m3fn)
    except FrugalError as error:
        pytest.skip(str(error))
    path, _ = fp8_file(tmp_path)
    patcher, _ = load(path, LOW)
    with torch.inference_mode():
        out = forward(patcher)
        layers = [patcher.model.diffusion_model.get_submodule(name) for name in LAYERS]
        assert all(layer.forward.args[1] is not fp8.reference for layer in layers)
        for layer in layers:
            layer.forward = type(layer.forward)(layer.forward.func, layer, fp8.reference)
        stepwise = forward(patcher)
    # Both round the same values to the same codes, but for the few that another order of sums moves
    # over the middle between two: they are nearer to each other than to the unrounded layers.
    exact = load(path, FULL)[0]
    with torch.inference_mode():
        assert bed.relative(out, stepwise) <= bed.relative(stepwise, forward(exact))


@pytest.mark.parametrize("resident", [True, False], ids=["merged", "low VRAM"])
def test_lora_on_fp8_in_low_precision(resident, units, tmp_path):
    path, meant = fp8_file(tmp_path)
    with torch.inference_mode():
        patcher = load_run.load_wan(path, products=LOW)[0]
        before = forward(patcher)
        lora, wanted = bed.lora_of(meant)
        patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=0 if resident else 64)
        out, exact = forward(patched), reference(wanted)
        # Without the LoRA the output is off by its whole effect.
        assert bed.relative(out, exact) < 0.08 < bed.relative(before, exact)
        patched.unpatch_model(torch.device("cpu"))
        assert torch.equal(forward(patcher), before)


def test_without_fp8_units_low_precision_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    path, _ = fp8_file(tmp_path)
    monkeypatch.setattr(load_run, "_tensors", lambda source: pytest.fail("weights were read"))
    with pytest.raises(FrugalError, match=r"cpu has none; expected compute capability 8\.9"):
        load(path, LOW)
    packed = bed.gptq_or_awq(SOURCE)[0]
    with pytest.raises(FrugalError, match="holds gptq, which has no low-precision product"):
        load(bed.write(tmp_path / "gptq.safetensors", packed), LOW)


def integer_file(folder, form):
    """(path, quantize) of a model whose block layers become int8, W4A8 or W4A4."""
    if form != "convrot_w4a4":
        path = bed.write(folder / "wan.safetensors", bed.base(SOURCE, torch.float32)[0])
        return path, {"int8_tensorwise": INT8_CONVROT, "asym_w4a8_int8": W4A8_NAME}[form]
    tensors = bed.base(SOURCE)[0]
    for layer in LAYERS:
        name = f"{layer}.weight"
        packed = comfy.quant_ops.QuantizedTensor.from_float(
            SOURCE[name], "TensorCoreConvRotW4A4Layout", convrot_groupsize=256
        )
        tensors.update(packed.state_dict(name))
        tensors.update(bed.declare(layer, format=form, convrot_groupsize=256))
    return bed.write(folder / "wan.safetensors", tensors), AS_STORED


INTEGER = ("int8_tensorwise", "asym_w4a8_int8", "convrot_w4a4")
# Least error of the kernels that round activations, to show that the switch matters.
ROUNDING = {"int8_tensorwise": 3e-3, "asym_w4a8_int8": 3e-3, "convrot_w4a4": 0.03}


@pytest.mark.parametrize("form", INTEGER)
def test_full_precision_expands_integers(form, tmp_path):
    if form not in KNOWN:
        pytest.skip(f"this ComfyUI has no {form}")
    path, quantize = integer_file(tmp_path, form)
    auto, _ = load(path, quantize=quantize)
    full, report = load(path, FULL, quantize)
    meant = loaded_weights(auto)
    assert "20 layers are expanded one at a time" in "\n".join(report.notes)
    # Exact in every layer: also the one whose weight ComfyUI reads past its forward.
    check(full, meant)
    with torch.inference_mode():
        expected = reference(meant)
        assert bed.relative(forward(full), expected) <= 1e-5
        assert bed.relative(forward(auto), expected) > ROUNDING[form]
    # The bytes are the same, in the model and in a saved one.
    one, other = (p.model.diffusion_model.blocks[0].ffn[2].state_dict() for p in (auto, full))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one)


@pytest.mark.parametrize("form", INTEGER)
def test_expansion_in_pieces_is_the_kernels_own(form, tmp_path, monkeypatch):
    if form not in KNOWN:
        pytest.skip(f"this ComfyUI has no {form}")
    path, quantize = integer_file(tmp_path, form)
    monkeypatch.setattr(matmul, "PIECE", 100 * 256)
    auto, full = load(path, quantize=quantize)[0], load(path, FULL, quantize)[0]
    for name in LAYERS:
        one, other = (p.model.diffusion_model.get_submodule(name).weight for p in (auto, full))
        one, other = one.dequantize(), other.dequantize()
        assert one.dtype == other.dtype == torch.float32
        # The rotation is a matrix product over at most 256 inputs.
        assert rounding.distance(one, other) <= rounding.bound(torch.float32, 256)


@pytest.mark.parametrize("resident", [True, False], ids=["merged", "low VRAM"])
@pytest.mark.parametrize("form", INTEGER)
def test_lora_on_expanded_layers(form, resident, tmp_path):
    if form not in KNOWN:
        pytest.skip(f"this ComfyUI has no {form}")
    path, quantize = integer_file(tmp_path, form)
    with torch.inference_mode():
        patcher = load_run.load_wan(path, "default", quantize, FULL)[0]
        before, meant = forward(patcher), loaded_weights(patcher)
        lora, wanted = bed.lora_of(meant)
        patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=0 if resident else 64)
        # Merged layers hold rounded weights, and multiply exactly with them; a patch made on the
        # fly is not rounded at all.
        now = loaded_weights(patched) if resident else wanted
        assert bed.relative(forward(patched), reference(now)) <= 1e-5
        patched.unpatch_model(torch.device("cpu"))
        assert torch.equal(forward(patcher), before)


@pytest.mark.parametrize("products", [AUTO, FULL])
def test_block_formats_obey(products, tmp_path):
    if "nvfp4" not in KNOWN:
        pytest.skip("this ComfyUI has no NVFP4")
    tensors, _, meant = bed.lightx2v_nvfp4(SOURCE)
    patcher, report = load(bed.write(tmp_path / "wan.safetensors", tensors), products)
    check(patcher, meant)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    assert layer._full_precision_mm
    assert any(note.startswith(f"matmul {products}") for note in report.notes)


def test_second_copy_multiplies_alike(units, tmp_path):
    path, _ = fp8_file(tmp_path)
    patcher, _ = load(path, LOW)
    if not hasattr(patcher, "cached_patcher_init"):
        pytest.skip("this ComfyUI has no second copies")
    factory, arguments = patcher.cached_patcher_init[:2]
    with torch.inference_mode():
        again = factory(*arguments, disable_dynamic=True)
        assert torch.equal(forward(again), forward(patcher))


@pytest.mark.parametrize("form", INTEGER)
def test_a_torch_for_an_older_cuda_is_named_and_works(form, tmp_path, monkeypatch):
    """ComfyUI switches comfy-kitchen's kernels off under it; what the CPU runs is what is left."""
    if form not in KNOWN:
        pytest.skip(f"this ComfyUI has no {form}")
    path, quantize = integer_file(tmp_path, form)
    before, _ = load(path, quantize=quantize)
    monkeypatch.setattr(matmul, "capability_of", lambda device: (8, 6))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    off = {"cuda": Backend(True, True, None, dict.fromkeys(hardware.INTEGER.values()))}
    monkeypatch.setattr(matmul, "kitchen_backends", lambda: off)
    patcher, report = load(path, quantize=quantize)
    [note] = [note for note in report.notes if note.startswith("matmul auto")]
    assert "torch is built for CUDA 12.8; install a torch built for CUDA 13.0 or newer" in note
    with torch.inference_mode():
        assert torch.equal(forward(patcher), forward(before))
    on = {"cuda": Backend(True, False, None, dict.fromkeys(hardware.INTEGER.values()))}
    monkeypatch.setattr(matmul, "kitchen_backends", lambda: on)
    assert "CUDA 12.8" not in "".join(load(path, quantize=quantize)[1].notes)


@pytest.mark.parametrize("form", INTEGER)
def test_a_device_without_products_of_integers(form, tmp_path, monkeypatch):
    """As Apple's: the layers are expanded without being asked to, and that is said."""
    if form not in KNOWN:
        pytest.skip(f"this ComfyUI has no {form}")
    path, quantize = integer_file(tmp_path, form)
    full, _ = load(path, FULL, quantize)
    monkeypatch.setattr(matmul, "why_no_int8_product", lambda device: "not implemented for it")
    patcher, report = load(path, quantize=quantize)
    assert any("no integer matmul (not implemented for it)" in note for note in report.notes)
    with torch.inference_mode():
        assert torch.equal(forward(patcher), forward(full))
    with pytest.raises(FrugalError, match="set matmul to auto or full precision"):
        load(path, LOW, quantize)


def test_a_device_without_8_bit_floats(tmp_path, monkeypatch):
    path, _ = fp8_file(tmp_path)
    monkeypatch.setattr(device_types, "why_no_float8", lambda device: "not implemented for it")
    monkeypatch.setattr(load_run, "_tensors", lambda source: pytest.fail("weights were read"))
    with pytest.raises(FrugalError, match="comes as float8_e4m3fn, and cpu has no"):
        load(path)
    plain = bed.write(tmp_path / "plain.safetensors", bed.base(SOURCE)[0])
    for quantize in (W4A8_NAME, FP8):
        with pytest.raises(FrugalError, match="quantize an unquantised one to int8 ConvRot"):
            load(plain, quantize=quantize)
    monkeypatch.undo()
    monkeypatch.setattr(device_types, "why_no_float8", lambda device: "not implemented for it")
    if "int8_tensorwise" in KNOWN:
        # The way out that the sentence names.
        patcher, _ = load(plain, quantize=INT8_CONVROT)
        with torch.inference_mode():
            assert forward(patcher).isfinite().all()
