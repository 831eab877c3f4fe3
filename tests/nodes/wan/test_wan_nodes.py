"""The Wan nodes as ComfyUI runs them: combos, fingerprints, outputs, text embeddings, patching."""

from __future__ import annotations

import json
import os
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.on_load import AS_STORED, FP8
from frugal.nodes import _models
from frugal.nodes.causal import nodes as causal_nodes
from frugal.nodes.text import embed_files
from frugal.nodes.text import nodes as text_nodes
from frugal.nodes.text.cached_encode import FrugalCachedTextEncode
from frugal.nodes.text.embeds import FrugalLoadTextEmbeds, FrugalSaveTextEmbeds
from frugal.nodes.vae import nodes as vae_nodes
from frugal.nodes.wan import load_run, row_scaled
from frugal.nodes.wan import nodes as wan_nodes
from frugal.nodes.wan.load import FrugalLoadWan
from frugal.tests.helpers import wan as bed

SOURCE = bed.weights()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model and output folders of their own."""
    for kind in (_models.FOLDER, embed_files.FOLDER):
        place = tmp_path / kind
        place.mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(place)], extensions))
        folder_paths.filename_list_cache.pop(kind, None)
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield tmp_path
    for kind in (_models.FOLDER, embed_files.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)


FAMILIES = (wan_nodes, text_nodes, vae_nodes, causal_nodes)


@pytest.mark.parametrize("node", [node for family in FAMILIES for node in family.NODES])
def test_schema_is_accepted(node):
    schema = node.GET_SCHEMA()
    assert schema.description and schema.category == "Frugal/wan"
    assert all(item.tooltip for item in [*schema.inputs, *schema.outputs])


def run(node, **inputs):
    """Execute a node the way ComfyUI does: on a locked clone with hidden inputs."""
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return getattr(clone, node.FUNCTION)(**inputs)


def test_load_wan_node(folders, monkeypatch):
    shown = []
    monkeypatch.setattr("frugal.nodes.wan.load.show_text", lambda _, text: shown.append(text))
    bed.write(folders / _models.FOLDER / "wan.safetensors", *bed.scaled(SOURCE, bed.E4)[:2])
    assert _models.model_names() == ["wan.safetensors"]
    inputs = {"model_name": "wan.safetensors", "weight_dtype": "default"}
    patcher, report = run(FrugalLoadWan, **inputs).result
    assert type(patcher.model).__name__ == "WAN21"
    assert "Wan T2V width 256, 2 blocks" in report
    assert "weights float8_e4m3fn, scale per tensor" in report
    assert shown == [report]
    before = FrugalLoadWan.fingerprint_inputs(**inputs)
    assert before == FrugalLoadWan.fingerprint_inputs(**inputs)
    os.utime(folders / _models.FOLDER / "wan.safetensors", (1, 1))
    assert FrugalLoadWan.fingerprint_inputs(**inputs) != before


def test_quantize_widget(folders):
    bed.write(folders / _models.FOLDER / "wan.safetensors", SOURCE)
    inputs = {"model_name": "wan.safetensors", "weight_dtype": "default"}
    _, report = run(FrugalLoadWan, **inputs, quantize=FP8).result
    assert "note: 20 layers are quantised to fp8 per-channel while loading" in report
    assert FrugalLoadWan.fingerprint_inputs(**inputs, quantize=FP8)
    combo = next(item for item in FrugalLoadWan.GET_SCHEMA().inputs if item.id == "quantize")
    # Optional, so that graphs saved before it existed still run.
    assert combo.optional and combo.default == AS_STORED and FP8 in combo.options


def test_combo_offers_an_index_in_place_of_its_parts(folders):
    place = folders / _models.FOLDER / "Wan2.1"
    place.mkdir()
    for name in ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"):
        (place / name).write_bytes(b"")
    (place / "lone-00001-of-00002.safetensors").write_bytes(b"")
    parts = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    (place / "m.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    names = [name.replace("\\", "/") for name in _models.model_names()]
    assert names == ["Wan2.1/lone-00001-of-00002.safetensors", "Wan2.1/m.safetensors.index.json"]
    index = _models.model_names()[1]
    assert _models.model_path(index).is_file()
    before = _models.fingerprint(index)
    os.utime(place / "m-00002-of-00002.safetensors", (1, 1))
    assert _models.fingerprint(index) != before


PARTS = {
    "LightX2V, by block": ("block_0.safetensors", "non_block.safetensors"),
    "LightX2V, by number": ("wan_fp8_part0.safetensors", "wan_fp8_part1.safetensors"),
    "marks in the name": tuple(f"m[fp16]-0000{n}-of-00002.safetensors" for n in (1, 2)),
}


@pytest.mark.parametrize("label", PARTS)
def test_parts_are_those_that_the_index_lists(label, folders):
    place = folders / _models.FOLDER / "wan"
    place.mkdir()
    names = PARTS[label]
    tensors = list(SOURCE.items())
    groups = dict(zip(names, (dict(tensors[::2]), dict(tensors[1::2])), strict=True))
    table = {key: name for name, group in groups.items() for key in group}
    for name, group in groups.items():
        bed.write(place / name, group)
    index = place / "model[1].safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    bed.write(place / "other.safetensors", {"a": torch.zeros(1)})
    entry = "wan/model[1].safetensors.index.json"
    found = [name.replace("\\", "/") for name in _models.model_names()]
    assert found == [entry, "wan/other.safetensors"]
    before = _models.fingerprint(entry)
    assert before == _models.fingerprint(entry)
    for name in names:
        os.utime(place / name, (1, 1))
        after = _models.fingerprint(entry)
        assert after != before
        before = after
    with pytest.raises(FrugalError, match=r"choose the entry model\[1\].safetensors.index.json"):
        run(FrugalLoadWan, model_name=f"wan/{names[0]}", weight_dtype="default")
    said = FrugalLoadWan.validate_inputs(model_name=f"wan/{names[0]}")
    assert "is a part of model[1].safetensors.index.json" in said
    os.remove(place / names[0])
    assert _models.fingerprint(entry) != before


def test_names_of_graphs_saved_on_windows(folders):
    (folders / _models.FOLDER / "sub").mkdir()
    bed.write(folders / _models.FOLDER / "sub" / "wan.safetensors", SOURCE)
    assert FrugalLoadWan.validate_inputs(model_name="sub\\wan.safetensors") is True
    patcher, _ = run(
        FrugalLoadWan, model_name="sub\\wan.safetensors", weight_dtype="default"
    ).result
    assert type(patcher.model).__name__ == "WAN21"
    assert FrugalLoadWan.fingerprint_inputs("sub\\wan.safetensors", "default")
    assert "is not in models" in FrugalLoadWan.validate_inputs(model_name="sub\\wan2.safetensors")


@pytest.mark.parametrize("name", ["umt5-xxl-encoder-Q8_0.gguf", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_file_that_is_there_and_not_on_offer(name, folders, monkeypatch):
    place = folders / "text_encoders"
    place.mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(place)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    (place / name).write_bytes(b"x")
    said = FrugalCachedTextEncode.validate_inputs(encoder_name=name)
    kind = "GGUF" if name.endswith("gguf") else "PyTorch"
    assert said.startswith("use the safetensors file of the same encoder")
    assert "download it" not in said
    assert f": {name} is in models/text_encoders and is a {kind} file" in said


@pytest.mark.parametrize("kind", ["gone", "empty", "gguf"])
def test_file_without_a_model(kind, folders):
    name = "wan.gguf" if kind == "gguf" else "wan.safetensors"
    if kind != "gone":
        (folders / _models.FOLDER / name).write_bytes(b"GGUF" if kind == "gguf" else b"")
    says = {"gone": "is not there", "empty": r"is empty \(0 bytes\)", "gguf": "expected a GGUF"}
    with pytest.raises(FrugalError, match=says[kind]):
        run(FrugalLoadWan, model_name=name, weight_dtype="default")


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "a/../../out.safetensors"]
)
def test_file_outside_the_model_folders(name, folders):
    bed.write(folders / "out.safetensors", SOURCE)
    name = name if not name.startswith("/") else str(folders / "out.safetensors")
    with pytest.raises(FrugalError, match="is not there"):
        run(FrugalLoadWan, model_name=name, weight_dtype="default")


def test_pickle_with_code_is_not_run(folders):
    path = folders / _models.FOLDER / "wan.pt"
    torch.save({"x": Path("anything")}, path)
    with pytest.raises(FrugalError, match="cannot be read as plain weights"):
        run(FrugalLoadWan, model_name="wan.pt", weight_dtype="default")


@pytest.mark.parametrize("weight_dtype", ["fp16", "bf16", "fp32"])
def test_weight_dtype(weight_dtype, folders):
    path = bed.write(folders / "wan.safetensors", SOURCE)
    patcher, _ = load_run.load_wan(path, weight_dtype)
    held = patcher.model.diffusion_model.blocks[0].ffn[0].weight
    expected = SOURCE["blocks.0.ffn.0.weight"].to(load_run.WEIGHT_DTYPES[weight_dtype])
    assert held.dtype == expected.dtype and torch.equal(held, expected)
    with pytest.raises(FrugalError, match="20 layers in float8_e4m3fn"):
        scaled = bed.write(folders / "fp8.safetensors", bed.scaled(SOURCE, bed.E4)[0])
        load_run.load_wan(scaled, weight_dtype)


def test_second_static_copy(folders):
    """ComfyUI asks the factory for another patcher when it needs one without dynamic loading."""
    path = bed.write(folders / "wan.safetensors", bed.scaled(SOURCE, bed.E4, rows=True)[0])
    patcher, _ = load_run.load_wan(path)
    if not hasattr(patcher, "cached_patcher_init"):
        pytest.skip("this ComfyUI has no second copies")
    factory, arguments = patcher.cached_patcher_init[:2]
    again = factory(*arguments, disable_dynamic=True)
    layer = again.model.diffusion_model.blocks[0].ffn[0]
    assert layer.layout_type == row_scaled.NAME
    assert again.model is not patcher.model


@pytest.mark.parametrize("rows", [False, True], ids=["per tensor", "per row"])
def test_lora_is_merged_and_taken_out_again(rows, folders):
    """Patches go through dequantise and quantise; taking them out restores the stored bytes."""
    tensors, _, meant = bed.scaled(SOURCE, bed.E4, rows=rows)
    path = bed.write(folders / "wan.safetensors", tensors)
    with torch.inference_mode():
        original, _ = load_run.load_wan(path)
        patcher = original.clone()
        name = "blocks.0.self_attn.q.weight"
        change = 0.3 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) / 16
        patcher.add_patches({f"diffusion_model.{name}": ("diff", (change,))})
        weight = patcher.model.diffusion_model.get_submodule(name.removesuffix(".weight"))
        before = weight.weight._qdata.clone()
        patcher.patch_model(device_to=torch.device("cpu"))
        merged = weight.weight.dequantize().float()
        expected = meant[name] + change
        assert bed.relative(merged, expected) < 0.06
        assert bed.relative(merged, meant[name]) > 0.1
        patcher.unpatch_model(torch.device("cpu"))
        assert torch.equal(weight.weight._qdata.float(), before.float())


def test_saved_text_embeds_come_back_bit_for_bit(folders):
    make = torch.Generator().manual_seed(1)
    values = torch.randn(1, 12, 64, generator=make)
    strided = torch.randn(64, 12, generator=make).t()[None]
    conditioning = [
        [
            values.to(torch.bfloat16),
            {
                "pooled_output": torch.tensor([[float("nan"), float("-inf"), 1e-45]]),
                "attention_mask": torch.ones(1, 12, dtype=torch.int64),
                "strength": 0.1 + 0.2,
                "guidance": None,
                "unclip": True,
                "clip_name": "wan",
                "start_percent": 0,
            },
        ],
        [strided, {"pooled_output": None, "same": strided}],
    ]
    run(FrugalSaveTextEmbeds, conditioning=conditioning, filename_prefix="a/b")
    name = "a/b_00001_.safetensors [output]"
    assert embed_files.names() == [name]
    (back,) = run(FrugalLoadTextEmbeds, embeds_name=name).result
    assert len(back) == 2
    for (tensor, extras), (expected, extras_expected) in zip(back, conditioning, strict=True):
        assert same_bits(tensor, expected)
        assert list(extras) == list(extras_expected)
        for key, value in extras_expected.items():
            if isinstance(value, torch.Tensor):
                assert same_bits(extras[key], value)
            else:
                assert extras[key] == value and type(extras[key]) is type(value)
    run(FrugalSaveTextEmbeds, conditioning=conditioning, filename_prefix="a/b")
    assert embed_files.names() == [name, "a/b_00002_.safetensors [output]"]
    assert not list((folders / "output").rglob("*.part"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (tensor.contiguous().view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


def test_text_embeds_refuse_what_they_cannot_hold(folders):
    for extras in ({"control": object()}, {"hooks": [1]}, {"x": float("nan")}, {"embedding": 1}):
        with pytest.raises(FrugalError, match=next(iter(extras))):
            embed_files.save([[torch.ones(1, 2, 4), extras]], "p")
    with pytest.raises(FrugalError, match="empty"):
        embed_files.save([], "p")
    with pytest.raises(FrugalError, match="file name is empty"):
        embed_files.save([[torch.ones(1, 2, 4), {}]], " ")
    assert not list((folders / "output").rglob("*.safetensors*"))


@pytest.mark.parametrize("prefix", ["../../out", "../out", "a/../../out"])
def test_text_embeds_stay_in_their_folder(prefix, folders):
    with pytest.raises(Exception, match=r"leads out|not allowed"):
        embed_files.save([[torch.ones(1, 2, 4), {}]], prefix)
    inside = folders / "output" / embed_files.FOLDER
    assert [path for path in folders.rglob("*out_00001*") if inside not in path.parents] == []


def test_foreign_text_embeds(folders):
    place = folders / embed_files.FOLDER
    tensor = torch.randn(1, 7, 4096).to(torch.float16)
    bed.write(place / "one.safetensors", {"prompt_embeds": tensor})
    bed.write(place / "two.safetensors", {"a": tensor, "b": tensor.clone()})
    bed.write(place / "flat.safetensors", {"a": tensor[0]})
    bed.write(place / "whole.safetensors", {"a": torch.ones(1, 7, 4, dtype=torch.int32)})
    bed.write(place / "broken.safetensors", {"0.x": tensor}, {"frugal_text_embeds": "{"})
    ((found, extras),) = embed_files.load("one.safetensors")
    assert same_bits(found, tensor) and extras == {}
    for name, message in (
        ("two", "holds 2 tensors"),
        ("flat", r"\[7, 4096\]"),
        ("whole", "int32"),
        ("broken", "damaged entries"),
        ("gone", "is not there"),
        ("../wan", "is not there"),
    ):
        with pytest.raises(FrugalError, match=message):
            embed_files.load(f"{name}.safetensors")
    with pytest.raises(FrugalError, match="is not there"):
        embed_files.load("../../one.safetensors [output]")


def test_core_models_sample_alike(folders):
    """A file in ComfyUI's own layout gives the very model of ComfyUI's own loader."""
    path = bed.write(folders / "wan.safetensors", bed.base(SOURCE, torch.float16)[0])
    with torch.inference_mode():
        ours = load_run.load_wan(path)[0].model
        theirs = comfy.sd.load_diffusion_model(str(path)).model
        given = bed.inputs()
        arguments = (given["x"], torch.tensor([0.6]))
        out = ours.apply_model(*arguments, c_crossattn=given["context"])
        assert torch.equal(out, theirs.apply_model(*arguments, c_crossattn=given["context"]))
