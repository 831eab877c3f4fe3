"""Quantise on load, GGUF and mapped weights in the ComfyUI under test."""

from __future__ import annotations

import comfy.model_management
import comfy.quant_ops
import pytest
import torch

from frugal.kernels.checkpoints.matmul_precision import AUTO
from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.on_load import AS_STORED, FP8, INT8_CONVROT, TARGETS, W4A8_NAME
from frugal.nodes import _memory, _models
from frugal.nodes.lora import unmerged_run
from frugal.nodes.wan import load_run, mapped, row_scaled
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import check, forward, loaded_weights, reference

SOURCE = bed.weights()
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
FORMAT = {FP8: "float8_e4m3fn", INT8_CONVROT: "int8_tensorwise", W4A8_NAME: "asym_w4a8_int8"}
# Largest errors of (weight, output) against the unquantised model.
WITHIN = {FP8: (0.03, 0.05), INT8_CONVROT: (0.012, 0.03), W4A8_NAME: (0.09, 0.12)}


def load(path, dtype="default", quantize=AS_STORED):
    with torch.inference_mode():
        return load_run.load_wan(path, dtype, quantize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantise_on_load(target, dtype, tmp_path):
    tensors, meant = bed.base(SOURCE, dtype)
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    if FORMAT[target] not in KNOWN:
        with pytest.raises(FrugalError, match=r"fp8 per-channel.*unknown to this ComfyUI; "):
            load(path, quantize=target)
        return
    patcher, report = load(path, quantize=target)
    held, layers = loaded_weights(patcher), bed.block_linears(SOURCE)
    for name in meant:
        error = bed.relative(held[name], meant[name])
        if name.removesuffix(".weight") in layers:
            assert 1e-4 < error < WITHIN[target][0], name
        else:
            assert error <= 1e-6, name
    with torch.inference_mode():
        out = forward(patcher)
        assert bed.relative(out, reference(meant)) < WITHIN[target][1]
        assert bed.correlation(out, reference(meant)) > 0.99
    # What runs is what the report counts.
    module = patcher.model.diffusion_model.blocks[0].ffn[0]
    assert any(name.startswith(FORMAT[target]) for name in report.formats)
    assert module.weight._qdata.nbytes == 512 * 256 // (2 if target == W4A8_NAME else 1)
    if target == FP8:
        assert module.layout_type == row_scaled.NAME
    if hasattr(patcher, "cached_patcher_init"):
        factory, arguments = patcher.cached_patcher_init[:2]
        assert arguments == (path, "default", target, AUTO) and callable(factory)


def test_quantising_a_quantised_file_is_refused(tmp_path):
    path = bed.write(tmp_path / "wan.safetensors", bed.scaled(SOURCE, bed.E4)[0])
    with pytest.raises(FrugalError, match="already holds 20 layers in float8_e4m3fn"):
        load(path, quantize=FP8)
    with pytest.raises(FrugalError, match="expected an unquantised file for the weight type fp16"):
        load(path, "fp16")
    plain = bed.write(tmp_path / "plain.safetensors", SOURCE)
    with pytest.raises(FrugalError, match="weight type fp16"):
        load(plain, "fp16", FP8)


def test_gguf_is_offered(tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "deep").mkdir()
    for name in ("a.gguf", "deep/b.GGUF", "c.safetensors", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    extensions = folder_paths.folder_names_and_paths[_models.FOLDER][1]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, _models.FOLDER, ([str(tmp_path)], extensions)
    )
    folder_paths.filename_list_cache.pop(_models.FOLDER, None)
    names = [name.replace("\\", "/") for name in _models.model_names()]
    folder_paths.filename_list_cache.pop(_models.FOLDER, None)
    assert names == ["a.gguf", "c.safetensors", "deep/b.GGUF"]
    assert _models.model_path(_models.model_names()[2]).is_file()


def mapped_file(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is that of a mapped file."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, rest = line.partition(" ")
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return rest.rstrip().endswith((".safetensors", ".pt"))
    raise AssertionError("an address outside all mappings")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_of_the_right_type_stay_mapped(kind, tmp_path):
    path = tmp_path / f"wan.{kind}"
    torch.save(SOURCE, path) if kind == "pt" else bed.write(path, SOURCE)
    patcher, _ = load(path, "fp32")
    assert mapped.useful()
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    assert mapped_file(layer.weight) and mapped_file(layer.bias)
    check(patcher, SOURCE)
    # Patches go to a copy: neither the file nor its mapping changes.
    before = path.read_bytes()
    with torch.inference_mode():
        patched = patcher.clone()
        change = torch.ones_like(layer.weight)
        patched.add_patches({"diffusion_model.blocks.0.ffn.0.weight": ("diff", (change,))})
        patched.patch_model(device_to=torch.device("cpu"))
        wanted = SOURCE["blocks.0.ffn.0.weight"] + 1
        torch.testing.assert_close(layer.weight.detach(), wanted)
        patched.unpatch_model(torch.device("cpu"))
        assert torch.equal(layer.weight, SOURCE["blocks.0.ffn.0.weight"])
    assert path.read_bytes() == before


def test_weights_of_another_type_are_converted(tmp_path):
    mixed = {name: t.half() if name.endswith("weight") else t for name, t in SOURCE.items()}
    path = bed.write(tmp_path / "wan.safetensors", mixed)
    for dtype, mapped_then in (("fp16", True), ("bf16", False), ("fp32", False)):
        patcher, report = load(path, dtype)
        layer = patcher.model.diffusion_model.blocks[0].ffn[0]
        kind = load_run.WEIGHT_DTYPES[dtype]
        assert layer.weight.dtype == layer.bias.dtype == kind
        assert mapped_file(layer.weight) == mapped_then
        # At fp16 the biases only.
        converted = next(note for note in report.notes if " MB are converted to " in note)
        assert (float(converted.split(" MB")[0]) < 1) == mapped_then
        assert torch.equal(layer.weight, mixed["blocks.0.ffn.0.weight"].to(kind))
        assert torch.equal(layer.bias, mixed["blocks.0.ffn.0.bias"].to(kind))


@pytest.mark.parametrize(
    "windows, pinned, kept",
    [(True, 10**9, False), (True, -1, True), (False, 10**9, True), (False, -1, True)],
)
def test_files_are_not_pinned_on_windows(windows, pinned, kept, tmp_path, monkeypatch):
    path = bed.write(tmp_path / "wan.safetensors", SOURCE)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(comfy.model_management, "MAX_PINNED_MEMORY", pinned, raising=False)
        elsewhere.setattr(_memory, "WINDOWS", windows)
        assert mapped.useful() == kept
        matrix = unmerged_run.stored(SOURCE["blocks.0.ffn.0.weight"], torch.float32)
        patcher = load(path, "fp32")[0]
    assert mapped_file(patcher.model.diffusion_model.blocks[0].ffn[0].weight) == kept
    assert (matrix.data_ptr() == SOURCE["blocks.0.ffn.0.weight"].data_ptr()) == kept


def test_fast_options_keep_comfyuis_own_operations(monkeypatch):
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, "fast", {"anything"})
    assert not mapped.useful()
