"""GPTQ, AWQ, W4A16 and LightX2V NVFP4 files into the ComfyUI under test: exact, packed, patched."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy.quant_ops
import comfy.sd
import pytest
import torch

from frugal.kernels.checkpoints.header import TensorInfo
from frugal.kernels.checkpoints.normalise import declaration, normalise, take_packed
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats.packed_int import PackedWeight
from frugal.nodes.wan import load_run, packed_int
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import check, forward, loaded_weights, reference

SOURCE = bed.weights()
LAYERS = bed.block_linears(SOURCE)
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
W4A16 = "awq_w4a16"
# Of outputs: float32 sums in another order.
EXACT = 2e-5


def load(path):
    with torch.inference_mode():
        return load_run.load_wan(path)


def packed_file(folder, label, config=bed.T2V):
    source = bed.weights(config)
    tensors, metadata, meant = (
        bed.w4a16(source, config=config)
        if label == W4A16
        else bed.gptq_or_awq(source, config, **bed.PACKED_LAYOUTS[label])
    )
    return bed.write(folder / "wan.safetensors", tensors, metadata), tensors, meant


@pytest.mark.parametrize("config", [bed.T2V, bed.I2V], ids=["T2V", "I2V"])
@pytest.mark.parametrize("label", [*bed.PACKED_LAYOUTS, W4A16])
def test_packed_layout_arrives_as_its_words_say(label, config, tmp_path):
    path, tensors, meant = packed_file(tmp_path, label, config)
    patcher, report = load(path)
    check(patcher, meant, config)
    layers = bed.block_linears(bed.weights(config), config)
    for layer in layers:
        module = patcher.model.diffusion_model.get_submodule(layer)
        words = tensors[f"{layer}.{'weight' if label == W4A16 else 'qweight'}"]
        assert torch.equal(module.weight._qdata, words)
    values = sum(meant[f"{layer}.weight"].numel() for layer in layers)
    held = next(size for name, size in report.formats.items() if "bits" in name)
    assert held == values * bed.PACKED_LAYOUTS.get(label, {}).get("bits", 4) // 8


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


@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits", W4A16])
def test_a_weight_that_is_set_is_not_rounded_to_few_bits(label, tmp_path):
    """As ComfyUI's hooks set it; and the words come back."""
    path, _, meant = packed_file(tmp_path, label)
    with torch.inference_mode():
        patcher = load(path)[0]
        name = "blocks.0.self_attn.q.weight"
        layer = patcher.model.diffusion_model.blocks[0].self_attn.q
        words = layer.weight._qdata.clone()
        change = 0.3 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) / 16
        patcher.add_patches({f"diffusion_model.{name}": ("diff", (change,))})
        patcher.patch_weight_to_device(f"diffusion_model.{name}")
        assert bed.relative(layer.weight.float(), meant[name] + change) <= 1e-6
        patcher.unpatch_model(torch.device("cpu"))
        assert torch.equal(layer.weight._qdata, words)


def words_of(patcher) -> list[torch.Tensor]:
    model = patcher.model.diffusion_model
    return [model.get_submodule(layer).weight._qdata for layer in LAYERS]


def held_packed(patcher) -> dict[str, PackedWeight]:
    """The packed weights of a loaded model by layer, in either shape of quantised tensor."""
    found = {}
    for name in bed.block_linears(SOURCE):
        weight = patcher.model.diffusion_model.get_submodule(name).weight
        held = getattr(weight, "_params", None) or SimpleNamespace(**weight._layout_params)
        found[name] = PackedWeight(weight._qdata, held.scale, held.zeros, held.g_idx, held.spec)
    return found


@pytest.mark.parametrize("resident", [True, False], ids=["merged", "low VRAM"])
@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits", W4A16])
def test_lora_file_acts_exactly_through_comfyuis_own_loader(label, resident, tmp_path):
    path, _, meant = packed_file(tmp_path, label)
    lora, wanted = bed.lora_of(meant)
    with torch.inference_mode():
        model = load(path)[0]
        before, words = forward(model), words_of(model)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        assert len(patched.patches) == len(LAYERS)
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=0 if resident else 64)
        out = forward(patched)
        assert bed.relative(out, reference(wanted)) <= EXACT < bed.relative(before, out)
        assert all(map(torch.equal, words_of(patched), words))
        patched.unpatch_model(torch.device("cpu"))
        model.patch_model(torch.device("cpu"), lowvram_model_memory=0 if resident else 64)
        assert torch.equal(forward(model), before)


@pytest.mark.parametrize("label", ["GPTQ 4 bits, act-order", "AWQ 4 bits"])
def test_bypassing_lora_is_exact(label, tmp_path):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI only merges")
    path, _, meant = packed_file(tmp_path, label)
    lora, wanted = bed.lora_of(meant)
    with torch.inference_mode():
        model = load_run.load_wan(path)[0]
        patched = comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        patched.patch_model(torch.device("cpu"))
        patched.inject_model()
        out = forward(patched)
        patched.eject_model()
        patched.unpatch_model(torch.device("cpu"))
        assert bed.relative(out, reference(wanted)) <= 2e-3


def test_w4a16_that_comfyui_runs_takes_patches(monkeypatch, tmp_path):
    """comfy-kitchen's own layout of the format, as newer ComfyUI versions load it."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    if not hasattr(comfy.quant_ops, "register_layout_class") or not hasattr(
        tensor, "TensorCoreAWQW4A16Layout"
    ):
        pytest.skip("no such layout")
    name = "TensorCoreAWQW4A16Layout"
    tensor.register_layout_class(name, tensor.TensorCoreAWQW4A16Layout)
    path, _, meant = packed_file(tmp_path, W4A16)
    with torch.inference_mode():
        model = load_run.load_wan(path)[0]
        for layer, held in held_packed(model).items():
            module = model.model.diffusion_model.get_submodule(layer)
            params = tensor.TensorCoreAWQW4A16Layout.Params(
                scale=held.scales,
                zeros=held.zeros,
                orig_dtype=torch.float32,
                orig_shape=(held.spec.rows, held.spec.width),
                group_size=held.spec.group_size,
            )
            theirs = comfy.quant_ops.QuantizedTensor(held.words, name, params)
            module.weight = torch.nn.Parameter(theirs, requires_grad=False)
            del module.set_weight
            packed_int.make_patchable(module)
        before = forward(model)
        # Its kernel multiplies in the 16-bit type of the scales.
        assert bed.relative(before, reference(meant)) <= 1e-2
        lora, wanted = bed.lora_of(meant)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        patched.patch_model(torch.device("cpu"))
        rounded = {**wanted, **{k: v for k, v in loaded_weights(patched).items() if k in meant}}
        worst = max(bed.relative(rounded[f"{n}.weight"], wanted[f"{n}.weight"]) for n in LAYERS)
        assert 0.01 < worst < 0.15
        assert bed.relative(forward(patched), reference(rounded)) <= 1e-2
        patched.unpatch_model(torch.device("cpu"))
        assert torch.equal(forward(model), before)


def test_known_w4a16_is_handed_to_comfyui():
    """The plan leaves the format to a ComfyUI that knows it, and takes it out for one that does
    not.
    """
    tensors, metadata, _ = bed.w4a16(SOURCE)
    facts = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    plan = plan_wan("wan", facts, metadata, tensors.__getitem__)
    assert not plan.packed and len(plan.layers) == len(LAYERS)
    stated = json.loads(declaration(plan, [W4A16])["_quantization_metadata"])["layers"]
    assert stated[LAYERS[0]] == {"format": W4A16, "group_size": 64}
    state = normalise(plan, tensors)
    assert take_packed(plan, state) == {}
    for suffix in ("weight", "weight_scale", "weight_zeros"):
        assert torch.equal(state[f"{LAYERS[0]}.{suffix}"], tensors[f"{LAYERS[0]}.{suffix}"])
    tensors[f"{LAYERS[0]}.weight_zeros"][0, 0] = float("inf")
    with pytest.raises(FrugalError, match="weight_zeros holds 1 values that are not finite"):
        normalise(plan, tensors)


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
