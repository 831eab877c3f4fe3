"""GPTQ, AWQ and LightX2V NVFP4 files into the ComfyUI under test: exact, packed, patchable."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy.quant_ops
import comfy.sd
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quant.packed_int import PackedWeight, dequantise, requantise
from frugal.nodes.wan import glue, packed_int
from frugal.tests import wan_bed as bed
from frugal.tests.wan_checks import check, forward, reference

SOURCE = bed.weights()
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def load(path):
    with torch.inference_mode():
        return glue.load_wan(path)


def packed_file(folder, label, config=bed.T2V):
    source = bed.weights(config)
    tensors, metadata, meant = bed.gptq_or_awq(source, config, **bed.PACKED_LAYOUTS[label])
    return bed.write(folder / "wan.safetensors", tensors, metadata), tensors, meant


@pytest.mark.parametrize("config", [bed.T2V, bed.I2V], ids=["T2V", "I2V"])
@pytest.mark.parametrize("label", bed.PACKED_LAYOUTS)
def test_packed_layout_arrives_as_its_words_say(label, config, tmp_path):
    path, tensors, meant = packed_file(tmp_path, label, config)
    patcher, report = load(path)
    check(patcher, meant, config)
    layers = bed.block_linears(bed.weights(config), config)
    for layer in layers:
        module = patcher.model.diffusion_model.get_submodule(layer)
        assert torch.equal(module.weight._qdata, tensors[f"{layer}.qweight"])
    values = sum(meant[f"{layer}.weight"].numel() for layer in layers)
    held = next(size for name, size in report.formats.items() if "bits" in name)
    assert held == values * bed.PACKED_LAYOUTS[label].get("bits", 4) // 8


def test_only_the_words_are_held(tmp_path):
    """The model's own count of bytes, which decides what fits, is that of 4-bit weights."""
    path, tensors, _ = packed_file(tmp_path, "GPTQ 4 bits, asymmetric")
    patcher, _ = load(path)
    packed = sum(t.nbytes for name, t in tensors.items() if name.endswith("qweight"))
    side = sum(t.nbytes for name, t in tensors.items() if name.endswith(("qzeros", "scales")))
    rest = sum(t.numel() for name, t in tensors.items() if name in SOURCE)
    widest = patcher.model.get_dtype().itemsize
    assert packed < patcher.model_size() <= 1.02 * (packed + 2 * side) + max(4, widest) * rest
    data = patcher.model.diffusion_model.blocks[0].ffn[0].weight._qdata
    assert data.nbytes == 512 * 256 // 2 and data.untyped_storage().nbytes() < 4 * data.nbytes


@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits", "GPTQ 8 bits"])
def test_lora_is_rounded_to_the_same_layout_and_taken_out_again(label, tmp_path):
    path, tensors, meant = packed_file(tmp_path, label)
    with torch.inference_mode():
        patcher = glue.load_wan(path)[0].clone()
        name = "blocks.0.self_attn.q.weight"
        change = 0.3 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) / 16
        patcher.add_patches({f"diffusion_model.{name}": ("diff", (change,))})
        layer = patcher.model.diffusion_model.blocks[0].self_attn.q
        patcher.patch_model(device_to=torch.device("cpu"))
        wanted = meant[name] + change
        merged = layer.weight.dequantize().float()
        assert layer.weight._qdata.shape == tensors["blocks.0.self_attn.q.qweight"].shape
        tolerance = 0.02 if "8 bits" in label else 0.15
        assert bed.relative(merged, wanted) < tolerance < bed.relative(merged, meant[name])
        out = forward(patcher)
        exact = reference({**meant, name: merged})
        assert bed.relative(out, exact) <= 2e-3
        patcher.unpatch_model(torch.device("cpu"))
        words = tensors["blocks.0.self_attn.q.qweight"]
        restored = patcher.model.diffusion_model.blocks[0].self_attn.q.weight._qdata
        assert torch.equal(restored, words)


def held_packed(patcher) -> dict[str, PackedWeight]:
    """The packed weights of a loaded model by layer, in either shape of quantised tensor."""
    found = {}
    for name in bed.block_linears(SOURCE):
        weight = patcher.model.diffusion_model.get_submodule(name).weight
        held = getattr(weight, "_params", None) or SimpleNamespace(**weight._layout_params)
        found[name] = PackedWeight(weight._qdata, held.scale, held.zeros, held.g_idx, held.spec)
    return found


@pytest.mark.parametrize("resident", [True, False], ids=["merged", "low VRAM"])
@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits"])
def test_lora_file_acts_through_comfyuis_own_loader(label, resident, tmp_path):
    """The result is the LoRA on the stored weights, exact where ComfyUI patches on the fly, else
    rounded to the layout once more.
    """
    path, _, meant = packed_file(tmp_path, label)
    lora, wanted = bed.lora_of(meant)
    with torch.inference_mode():
        model = glue.load_wan(path)[0]
        before, packed = forward(model), held_packed(model)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        assert len(patched.patches) == len(bed.block_linears(SOURCE))
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=0 if resident else 64)
        out = forward(patched)
        exact, rounded = reference(wanted), dict(wanted)
        for name in bed.block_linears(SOURCE):
            like = packed[name]
            rounded[f"{name}.weight"] = dequantise(
                requantise(wanted[f"{name}.weight"], like), torch.float32
            )
        on_the_fly = not resident and hasattr(comfy.quant_ops, "register_layout_class")
        assert bed.relative(out, exact if on_the_fly else reference(rounded)) <= 2e-3
        assert bed.relative(out, exact) < bed.relative(before, exact)
        patched.unpatch_model(torch.device("cpu"))
        assert torch.equal(forward(model), before)


@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits"])
def test_bypassing_lora_is_exact(label, tmp_path):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI only merges")
    path, _, meant = packed_file(tmp_path, label)
    lora, wanted = bed.lora_of(meant)
    with torch.inference_mode():
        model = glue.load_wan(path)[0]
        patched = comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        patched.patch_model(torch.device("cpu"))
        patched.inject_model()
        out = forward(patched)
        patched.eject_model()
        patched.unpatch_model(torch.device("cpu"))
        assert bed.relative(out, reference(wanted)) <= 2e-3


def test_saved_model_does_not_pass_for_another_format(tmp_path):
    path, *_ = packed_file(tmp_path, "AWQ 4 bits")
    patcher, _ = load(path)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    if "float8_e5m2" not in KNOWN:
        pytest.skip("this ComfyUI writes no formats")
    entry = json.loads(bytes(layer.state_dict()["comfy_quant"].tolist()))
    assert entry["format"] == packed_int.NAME and packed_int.NAME not in KNOWN


SETTINGS = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
def test_settings_beside_the_file_are_read_in_a_folder_of_its_own(file, tmp_path):
    tensors, _, meant = bed.gptq_or_awq(SOURCE, symmetric=True, version=2)
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    with pytest.raises(FrugalError, match="in version 2 and not in version 1"):
        load(path)
    content = SETTINGS if file == "quantize_config.json" else {"quantization_config": SETTINGS}
    (tmp_path / file).write_text(json.dumps(content))
    check(load(path)[0], meant)
    # Beside another model it is not known whose settings they are.
    bed.write(tmp_path / "other.safetensors", {"x": torch.ones(1)})
    with pytest.raises(FrugalError, match="in version 2 and not in version 1"):
        load(path)


@pytest.mark.parametrize("older", [False, True], ids=["alpha", "input_absmax"])
def test_lightx2v_nvfp4_is_exact_or_refused(older, tmp_path):
    tensors, _, meant = bed.lightx2v_nvfp4(SOURCE, older)
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    if "nvfp4" not in KNOWN:
        with pytest.raises(FrugalError, match="20 layers in nvfp4"):
            load(path)
        return
    patcher, report = load(path)
    check(patcher, meant)
    assert any("LightX2V" in note for note in report.notes)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    assert float(layer.input_scale) == pytest.approx(5.0 / 2688)


def test_lightx2v_scales_that_contradict(tmp_path):
    tensors = bed.lightx2v_nvfp4(SOURCE)[0] | bed.lightx2v_nvfp4(SOURCE, older=True)[0]
    layer = "blocks.0.ffn.2"
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    if "nvfp4" in KNOWN:
        load(path)
        tensors[f"{layer}.weight_global_scale"] = 2 * tensors[f"{layer}.weight_global_scale"]
        bed.write(path, tensors)
        with pytest.raises(FrugalError, match=f"{layer} has weight scales"):
            load(path)
        tensors[f"{layer}.alpha"] = torch.tensor(float("nan"))
        bed.write(path, tensors)
        with pytest.raises(FrugalError, match="alpha = nan"):
            load(path)
