"""The saver: bit-equal round trips, metadata, LoRA merged, nothing half written."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frugal.kernels.atomic_write import WriteError
from frugal.kernels.errors import FrugalError
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.tryon import load_run, nodes, saving
from frugal.tests.helpers import tryon as bed
from frugal.tests.helpers.full_disk import room_for

ATTN = "diffusion_model.input_blocks.5.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.3.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("catvton")
    base = {n: t.half() for n, t in bed.state(bed.make_unet(0)).items()}
    save_file(base, root / "base.safetensors", bed.META | {"modelspec.prediction_type": "v"})
    attention = bed.attention_tensors(bed.make_unet(1))
    save_file(attention, root / "attention.safetensors", {"frugal.licence": "made up"})
    return str(root / "base.safetensors"), str(root / "attention.safetensors")


def stored(patcher):
    return {n: t.clone() for n, t in patcher.model.diffusion_model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "kind, dtype", [("as stored", "fp16"), ("as stored", "fp32"), ("int8", "auto"), ("fp8", "bf16")]
)
def test_what_is_saved_reads_back_bit_for_bit(files, tmp_path, kind, dtype):
    patcher = load_run.load_catvton(*files, dtype, kind)
    path = str(tmp_path / "saved.safetensors")
    report = saving.save_catvton(patcher, path)
    again = load_run.load_catvton(path, None, dtype)
    before, after = stored(patcher), stored(again)
    assert before.keys() == after.keys() and not [n for n in before if ".attn2." in n]
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    x, t = bed.inputs()
    assert torch.equal(bed.run(again, x, t), bed.run(patcher, x, t))
    assert again.model.model_type.name == "V_PREDICTION"
    assert again.model.model_config.unet_config["num_heads"] == bed.HEADS
    assert again.attachments[REPORT_KEY].licence == "made up"
    assert again.attachments[REPORT_KEY].formats == patcher.attachments[REPORT_KEY].formats
    assert "licence: made up" in report and "no text" not in report
    said = metadata(path)
    assert said["frugal.variant"] == "masked"
    assert said.get("frugal.quantization") == {
        "int8": "frugal_conv_int8, int8_tensorwise",
        "fp8": "float8_e4m3fn, frugal_conv_fp8",
    }.get(kind)
    assert ("'Load CatVTON' alone" in report) == (kind != "as stored")
    # And once more: a saved file saves to the same tensors.
    twice = tmp_path / "twice.safetensors"
    saving.save_catvton(again, str(twice))
    assert equal(load_file(path), load_file(twice))


def test_a_quantised_file_is_half_as_large(files, tmp_path):
    sizes = {}
    for kind, dtype in (("as stored", "fp16"), ("int8", "fp16")):
        path = tmp_path / f"{kind}.safetensors"
        saving.save_catvton(load_run.load_catvton(*files, dtype, kind), str(path))
        sizes[kind] = path.stat().st_size
    # The tiny model has a larger share of layers that stay in floats than the real one.
    assert sizes["int8"] < 0.6 * sizes["as stored"]


def test_a_quantised_file_is_not_quantised_again(files, tmp_path):
    path = str(tmp_path / "int8.safetensors")
    patcher = load_run.load_catvton(*files, "auto", "int8")
    saving.save_catvton(patcher, path)
    same = load_run.load_catvton(path, None, "auto", "int8")
    assert equal(stored(same), stored(patcher))
    with pytest.raises(FrugalError, match="already holds 56 layers"):
        load_run.load_catvton(path, None, "auto", "fp8")


def test_another_attention_file_on_a_quantised_base(files, tmp_path):
    path = str(tmp_path / "int8.safetensors")
    saving.save_catvton(load_run.load_catvton(*files, "auto", "int8"), path)
    other = bed.make_unet(2)
    save_file(bed.attention_tensors(other), tmp_path / "other.safetensors")
    mixed = load_run.load_catvton(path, str(tmp_path / "other.safetensors"), "fp32")
    names = stored(mixed)
    key = ATTN.removeprefix("diffusion_model.")
    assert names[key].dtype == torch.float32 and f"{key}_scale" not in names
    assert names[CONV.removeprefix("diffusion_model.")].dtype == torch.int8
    whole = load_run.load_catvton(path, str(tmp_path / "other.safetensors"), "fp32", "int8")
    assert stored(whole)[key].dtype == torch.int8
    x, t = bed.inputs()
    assert 0 < bed.relative(bed.run(whole, x, t), bed.run(mixed, x, t)) < 2.5e-2


@pytest.mark.parametrize("kind", ["as stored", "int8", "fp8"])
def test_a_lora_is_merged_as_comfyui_merges_it(files, tmp_path, kind):
    patcher = load_run.load_catvton(*files, "fp32", kind)
    x, t = bed.inputs()
    plain = bed.run(patcher, x, t)
    before = stored(patcher)
    clone = patcher.clone()
    g = torch.Generator().manual_seed(4)
    for key, shape in ((ATTN, (192, 192)), (CONV, (128, 64, 3, 3))):
        assert clone.add_patches({key: ("diff", (0.02 * torch.randn(shape, generator=g),))})
    path, loaded = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    report = saving.save_catvton(clone, path)
    assert "2 patched weights merged" in report
    patched = bed.run(clone, x, t)
    # Saved while it is loaded, and so merged already: the same file.
    saving.save_catvton(clone, loaded)
    one = load_file(path)
    assert equal(one, load_file(loaded))
    scale = one.get(f"{ATTN.removeprefix('diffusion_model.')}_scale", torch.zeros(0))
    assert scale.shape == {"as stored": (0,), "int8": (192, 1), "fp8": ()}[kind]
    again = bed.run(load_run.load_catvton(path, None, "fp32"), x, t)
    assert bed.relative(again, patched) <= 1e-6
    assert bed.relative(again, plain) > 0.1
    assert torch.equal(bed.run(patcher, x, t), plain)
    assert equal(stored(patcher), before)


def test_other_models_and_changes_that_are_no_weights_are_refused(files, tmp_path):
    path = str(tmp_path / "x.safetensors")
    patcher = load_run.load_catvton(*files, "fp32")

    def refused(match, change):
        clone = patcher.clone()
        change(clone)
        with pytest.raises(FrugalError, match=match):
            saving.save_catvton(clone, path)

    refused("replaced modules", lambda c: c.add_object_patch("diffusion_model.out", None))
    refused("wrapped weights", lambda c: c.add_weight_wrapper(CONV, lambda w: w))
    kept, patcher.model.model_config = patcher.model.model_config, None
    refused("of another loader", lambda c: None)
    patcher.model.model_config = kept
    wrapped = patcher.clone()
    wrapped.add_wrapper_with_key("apply_model", "side", lambda *_: None)
    assert "1 wrappers ('side' ...)" in saving.save_catvton(wrapped, path)


def test_nothing_is_left_when_writing_fails(files, tmp_path):
    patcher = load_run.load_catvton(*files, "fp32")
    path = tmp_path / "saved.safetensors"
    path.write_bytes(b"before")
    with room_for(100_000), pytest.raises(WriteError, match=r"saved\.safetensors"):
        saving.save_catvton(patcher, str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["saved.safetensors"]
    assert path.read_bytes() == b"before"


def test_the_node_numbers_its_files_in_the_output_folder(files, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patcher = load_run.load_catvton(*files, "fp16")
    node = nodes.saving.FrugalSaveCatVTON
    for number in (1, 2):
        (text,) = node.PREPARE_CLASS_CLONE(None).execute(patcher, "diffusion_models/mine").args
        assert text.startswith(f"output/diffusion_models/mine_0000{number}_.safetensors: ")
        assert (tmp_path / "diffusion_models" / f"mine_0000{number}_.safetensors").is_file()
