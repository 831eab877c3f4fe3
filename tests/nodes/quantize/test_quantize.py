"""Quantised files in ComfyUI: its own loader and the pack's read what the file says; the node."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, table
from frugal.kernels.quantize.convert import convert, uniform
from frugal.kernels.quantize.weights import Weights
from frugal.nodes.lora.merge import LoraMerge
from frugal.nodes.quantize import convert as node
from frugal.nodes.quantize import convert_run
from frugal.nodes.wan import load_run as wan
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import forward, loaded_weights, reference

pytest.importorskip("comfy_kitchen")
SOURCE = bed.weights()
KNOWN = wan._known_formats()
HERE = [t for t in table.TARGETS if table.FORMATS.get(t, KNOWN and KNOWN[0]) in KNOWN]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return bed.write(tmp_path_factory.mktemp("wan") / "wan.safetensors", bed.base(SOURCE)[0])


def converted(path, folder, target, **more):
    source, named = Weights(path), isinstance(target, str)
    choice = uniform(source, target) if named else target
    out = folder / f"{target if named else 'mixed'}.safetensors"
    return out, convert(source, out, choice, **more)


def stands_for(path):
    held = Weights(path)
    return {f"{layer}.weight": held.weight(layer).float() for layer in held.shapes}


def stock(path):
    """The model as ComfyUI alone loads it, and everything that it logged."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        patcher = comfy.sd.load_diffusion_model(str(path))
    finally:
        logging.getLogger().removeHandler(handler)
    return patcher, [text for text in found if "unet missing" in text or "unexpected" in text]


def agree(patcher, meant):
    got = loaded_weights(patcher)
    for name, weight in meant.items():
        assert bed.relative(got[name], weight) <= 1e-6, name


@pytest.mark.parametrize("target", HERE)
def test_comfyui_alone_loads_the_file(target, original, tmp_path):
    path, _ = converted(original, tmp_path, target)
    with torch.inference_mode():
        patcher, complaints = stock(path)
        assert all(".comfy_quant" in key for key in complaints), complaints
        agree(patcher, stands_for(path))
        layer = patcher.model.diffusion_model.blocks[0].ffn[0]
        assert hasattr(layer.weight, "_qdata") == (target != table.BF16)
        out, exact = forward(patcher), forward(stock(original)[0])
    bound = {table.BF16: 1e-3, table.FP8: 0.05, table.INT8: 0.02}.get(target, 0.15)
    assert bed.relative(out, exact) < bound


@pytest.mark.parametrize("target", HERE)
def test_the_packs_loader_reads_the_same(target, original, tmp_path):
    path, _ = converted(original, tmp_path, target)
    with torch.inference_mode():
        ours, theirs = wan.load_wan(path)[0], stock(path)[0]
        agree(ours, stands_for(path))
        assert bed.relative(forward(ours), forward(theirs)) < 1e-3


def test_awq_runs_in_the_packs_loader(original, tmp_path):
    """ComfyUI 0.33 and before do not know the format."""
    path, report = converted(original, tmp_path, table.AWQ)
    assert "ComfyUI-Frugal's loader" in report.notes[-1]
    with torch.inference_mode():
        out, exact = forward(wan.load_wan(path)[0]), forward(stock(original)[0])
    meant = {
        name: tensor.float() for name, tensor in comfy.utils.load_torch_file(str(original)).items()
    }
    expected = reference(meant | stands_for(path))
    assert bed.relative(out, expected) < 2e-3
    assert 0.01 < bed.relative(out, exact) < 0.15


def test_layers_outside_the_blocks_load_too(original, tmp_path):
    """A budget may choose any linear layer; ComfyUI must find the model by its shapes all the
    same.
    """
    target = table.W4A8 if table.W4A8 in HERE else table.FP8
    path, _ = converted(original, tmp_path, dict.fromkeys(Weights(original).shapes, target))
    with torch.inference_mode():
        patcher, _ = stock(path)
        agree(patcher, stands_for(path))
        assert bool(torch.isfinite(forward(patcher)).all())


def lora(path, styles=("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight")):
    make = torch.Generator().manual_seed(5)
    tensors, change = {}, {}
    for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        out, inside = SOURCE[f"{layer}.weight"].shape
        down = 0.05 * torch.randn(4, inside, generator=make)
        up = 0.05 * torch.randn(out, 4, generator=make)
        name = layer.replace(".", "_") if styles[0].startswith("lora_unet") else layer
        tensors |= {styles[0].format(name): down, styles[1].format(name): up}
        change[f"{layer}.weight"] = up @ down
    return bed.write(path, tensors), change


@pytest.mark.parametrize(
    "styles",
    [
        ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
        ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    ],
)
def test_lora_is_merged_before_rounding(styles, original, tmp_path):
    path, change = lora(tmp_path / "lora.safetensors", styles)
    merge = LoraMerge(Weights(original), [(path, 0.5), (path, 0.25)])
    assert merge.names == set(change)
    assert merge.notes[0] == "lora.safetensors at 0.5: 4 of 4 keys applied"
    out, report = converted(original, tmp_path, table.INT8, merge=merge)
    assert report.notes[-2:] == merge.notes
    plain, _ = converted(original, tmp_path, {}, merge=merge)
    held, made = Weights(out), Weights(plain)
    for name, delta in change.items():
        layer = name.removesuffix(".weight")
        wanted = SOURCE[name].bfloat16().float() + 0.75 * delta
        # The two strengths are added one after the other, so a few values round the other way.
        assert float((made.weight(layer).float() - wanted).abs().max()) < 2**-8 * wanted.abs().max()
        parts = codec.encode(table.INT8, wanted, "cpu")
        got = held.stored(layer)
        error = bed.relative(held.weight(layer), wanted)
        assert error < 0.02 and got[f"{layer}.weight"].shape == parts["weight"].shape
        unmerged = bed.relative(held.weight(layer), SOURCE[name])
        assert unmerged > 5 * error


def test_lora_keys_that_fit_nowhere_are_told(original, tmp_path):
    path, _ = lora(tmp_path / "lora.safetensors")
    tensors = comfy.utils.load_torch_file(str(path))
    tensors["diffusion_model.blocks.9.ffn.0.lora_A.weight"] = torch.ones(4, 256)
    tensors["text_encoder.layer.lora_A.weight"] = torch.ones(4, 256)
    some = bed.write(tmp_path / "some.safetensors", tensors)
    (note,) = LoraMerge(Weights(original), [(some, 1.0)]).notes
    assert note.startswith(
        "some.safetensors at 1: 1 of 5 keys not applied: diffusion_model.blocks.9"
    )
    assert note.endswith("1 keys are for a text encoder")
    none = bed.write(tmp_path / "none.safetensors", {"other.lora_A.weight": torch.ones(4, 4)})
    with pytest.raises(FrugalError, match="none that fits"):
        LoraMerge(Weights(original), [(none, 1.0)])


def test_lora_of_other_shapes_is_an_error(original, tmp_path):
    """ComfyUI logs it and goes on with the weight as it was."""
    wrong = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(4, 96),
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.ones(512, 4),
    }
    path = bed.write(tmp_path / "lora.safetensors", wrong)
    merge = LoraMerge(Weights(original), [(path, 1.0)])
    with pytest.raises(FrugalError, match=r"could not merge a LoRA into blocks\.0\.ffn\.0"):
        converted(original, tmp_path, table.FP8, merge=merge)


@pytest.fixture
def folders(tmp_path, monkeypatch, original):
    """Model folders of their own, the old name first as in ComfyUI."""
    kinds = {"diffusion_models": ("unet", "diffusion_models"), "loras": ("loras",)}
    kinds[convert_run.CALIBRATION] = ("calibration",)
    for kind, names in kinds.items():
        places = [str(tmp_path / name) for name in names]
        for name in names:
            (tmp_path / name).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (places, extensions))
        folder_paths.filename_list_cache.pop(kind, None)
    (tmp_path / "unet" / "wan.safetensors").symlink_to(original)
    lora(tmp_path / "loras" / "l.safetensors")
    yield tmp_path
    for kind in kinds:
        folder_paths.filename_list_cache.pop(kind, None)


DEFAULTS = {
    "model_name": "wan.safetensors", "format": table.FP8, "size_gb": 1.0, "calibration": "none",
    "lora_name": "none", "lora_strength": 1.0, "measure": True, "filename_prefix": "made",
    "overwrite": False, "allow_int8": True, "allow_fp8": True, "allow_w4a8": True,
    "allow_w4a8_g64": True, "allow_awq": True,
}  # fmt: skip


def run(**inputs):
    clone = node.FrugalQuantize.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return getattr(clone, node.FrugalQuantize.FUNCTION)(**{**DEFAULTS, **inputs})


def test_schema_fits_the_defaults(folders):
    schema = node.FrugalQuantize.GET_SCHEMA()
    assert [item.id for item in schema.inputs if item.id in DEFAULTS] == [
        item.id for item in schema.inputs
    ]
    assert {item.id for item in schema.inputs} == set(DEFAULTS)


def test_node_writes_a_file_that_loaders_list(folders):
    out = run(lora_name="l.safetensors", lora_strength=0.5)
    name, report, chart = out.args
    assert name == "made_fp8.safetensors" and name in folder_paths.get_filename_list(
        "diffusion_models"
    )
    assert (folders / "diffusion_models" / name).is_file()
    assert (folders / "diffusion_models" / "made_fp8.quality.json").is_file()
    assert "l.safetensors at 0.5: 4 of 4 keys applied" in report
    assert "20 layers fp8" in report and "6 layers bfloat16" in report
    assert chart.shape == (1, 640, 1024, 3) and float(chart.std()) > 0.02
    with pytest.raises(FrugalError, match=r"made_fp8\.safetensors exists already"):
        run()
    run(overwrite=True, measure=False)
    assert not any(path.name.endswith((".part", ".part.json")) for path in folders.rglob("*"))


def test_node_meets_a_size(folders):
    some = {"allow_fp8": False, "allow_w4a8": False, "allow_w4a8_g64": False, "format": node.BUDGET}
    small = run(format=table.AWQ, measure=False).args[0]
    size = (folders / "diffusion_models" / small).stat().st_size
    budget = 1.05 * size / 1e9
    name, report, _ = run(**some, size_gb=budget).args
    held = Weights(folders / "diffusion_models" / name)
    weights = sum(info.nbytes for info in held.source.tensors.values())
    assert 0.9 * 1e9 * budget < weights <= 1e9 * budget
    assert f"({weights} bytes) in a budget of" in report
    with pytest.raises(FrugalError, match="the smallest size"):
        run(**some, size_gb=0.001)


def test_another_calibration_or_lora_under_its_old_name_is_new_work(folders):
    def state():
        used = {"calibration": "c.safetensors", "lora_name": "l.safetensors"}
        return node.FrugalQuantize.fingerprint_inputs(**DEFAULTS | used)

    (folders / "calibration" / "c.safetensors").write_bytes(b"one")
    before = state()
    assert state() == before
    (folders / "calibration" / "c.safetensors").write_bytes(b"other")
    between = state()
    (folders / "loras" / "l.safetensors").write_bytes(b"another")
    assert len({before, between, state()}) == 3


@pytest.mark.parametrize("prefix", ["", "  ", "../out", "/tmp/out", "a/"])
def test_names_that_lead_elsewhere(prefix, folders):
    with pytest.raises(FrugalError, match="a file name inside"):
        run(filename_prefix=prefix)


def test_cancelled_work_goes_on(folders, monkeypatch, caplog):
    whole = run(filename_prefix="whole", measure=False).args[0]
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 60:
            raise comfy.model_management.InterruptProcessingException

    check = "throw_exception_if_processing_interrupted"
    monkeypatch.setattr(comfy.model_management, check, interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(measure=False)
    place = folders / "diffusion_models"
    assert (place / "made_fp8.safetensors.part").is_file()
    assert not (place / "made_fp8.safetensors").exists()
    assert "or delete made_fp8.safetensors.part*" in caplog.text
    name = run(measure=False).args[0]
    assert (place / name).read_bytes() == (place / whole).read_bytes()
    assert len(list(place.iterdir())) == 2
