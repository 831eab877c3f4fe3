"""Relatives of Wan load as ComfyUI's own classes of them, in every format; nothing else does."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.request import Job, run
from frugal.kernels.quantize.weights import Weights
from frugal.nodes.quantize.convert_run import convert
from frugal.nodes.wan import load_run, row_scaled
from frugal.nodes.wan.structure import structure
from frugal.tests.helpers import gguf, relatives
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.packed import gptq_or_awq_layer
from frugal.tests.helpers.wan_checks import loaded_weights


def fp8(weight, rows):
    stored, scale, meant = bed.fp8(weight, bed.E4, rows)
    return {"weight": stored, "weight_scale": scale}, meant


def gptq(weight):
    tensors, meant = gptq_or_awq_layer(weight.bfloat16())
    return tensors, meant


FORMATS = {
    "fp32": None,
    "fp8": lambda weight: fp8(weight, False),
    "fp8 per row": lambda weight: fp8(weight, True),
    "GPTQ": gptq,
}


@pytest.fixture(params=relatives.CLASSES)
def relative(request):
    """(label, tensors of a file in fp32, its block linears, all its linears)"""
    model = relatives.network(request.param)
    if model is None:
        pytest.skip("this ComfyUI has no such class")
    found = relatives.weights(model), relatives.linears(model), relatives.linears(model, False)
    return request.param, *found


def load(path, *choices):
    with torch.inference_mode():
        return load_run.load_wan(path, *choices)


@pytest.mark.parametrize("form", FORMATS)
def test_loads_as_comfyuis_class(relative, form, tmp_path):
    label, source, blocks, _ = relative
    make, held, meant = FORMATS[form], dict(source), dict(source)
    if make is not None:
        for layer in blocks:
            tensors, meant[f"{layer}.weight"] = make(held.pop(f"{layer}.weight"))
            held |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    prefix = "model.diffusion_model."
    path = bed.write(tmp_path / "wan.safetensors", {prefix + name: held[name] for name in held})
    if form in ("fp8 per row", "GPTQ") and not row_scaled.supported():
        pytest.skip("this ComfyUI has no quantised tensors")
    patcher, report = load(path)
    wanted = comfy.sd.load_diffusion_model_state_dict(dict(source))
    assert type(patcher.model) is type(wanted.model)
    assert type(patcher.model.diffusion_model) is type(wanted.model.diffusion_model)
    assert label in report.title
    found = loaded_weights(patcher)
    assert set(found) <= set(meant)
    for name, value in found.items():
        assert bed.relative(value, meant[name]) <= (1e-6 if name in blocks else 4e-3), name


def test_gguf(relative, tmp_path):
    pytest.importorskip("gguf")
    label, source, blocks, _ = relative
    path = tmp_path / "wan.gguf"
    meant = gguf.write(path, source, "Q8_0", layers=blocks)
    patcher, report = load(path)
    assert label in report.title and "GGUF Q8_0" in report.formats
    for name, value in loaded_weights(patcher).items():
        assert bed.relative(value, meant[name]) <= 4e-3, name


def test_quantised(relative, tmp_path):
    """On load, and by the converter, whose file loads."""
    _, source, blocks, _ = relative
    path, out = bed.write(tmp_path / "wan.safetensors", source), tmp_path / "out.safetensors"
    patcher, _ = load(path, "default", "fp8 per-channel")
    found = loaded_weights(patcher)
    written, _ = convert(Job(path, out, "fp8", device=torch.device("cpu")), []), load(out)
    assert written.report.layers["fp8"][0] > 0
    exact = Weights(out, structure)
    for layer in blocks:
        source_weight = source[f"{layer}.weight"]
        assert bed.relative(found[f"{layer}.weight"], source_weight) < 0.04
        assert bed.relative(exact.weight(layer), source_weight) < 0.04


def test_strict_about_every_tensor(relative, tmp_path):
    label, source, _, every = relative
    # What ComfyUI tells a family by is not among the last ones.
    lost = [name for name in every if not name.startswith(("blocks.", "text", "time", "head."))][-1]
    less = {name: tensor for name, tensor in source.items() if name != f"{lost}.weight"}
    with pytest.raises(FrugalError, match=f"lacks {lost}.weight"):
        load(bed.write(tmp_path / "less.safetensors", less))
    more = source | {"blocks.0.unheard_of.weight": torch.zeros(4, 4)}
    with pytest.raises(FrugalError, match="unheard_of"):
        load(bed.write(tmp_path / "more.safetensors", more))
    with pytest.raises(FrugalError, match=f"inside ComfyUI.*is Wan {label}"):
        run(Job(bed.write(tmp_path / "wan.safetensors", source), tmp_path / "o.safetensors", "fp8"))


def test_a_type_that_only_the_metadata_state(tmp_path):
    """A model of plain shapes that says what it is goes to that class, or is refused."""
    import comfy.supported_models

    config = '{"transformer": {"model_type": "%s"}}'
    path = tmp_path / "wan.safetensors"
    bed.write(path, bed.weights(bed.I2V), {"config": config % "animate2"})
    if hasattr(comfy.supported_models, "WAN_Animate2"):
        patcher, _ = load(path)
        assert type(patcher.model).__name__ == "WAN_Animate2"
    else:
        with pytest.raises(FrugalError, match="update ComfyUI"):
            load(path)
    bed.write(path, bed.weights(bed.I2V), {"config": config % "unheard_of"})
    with pytest.raises(FrugalError, match="update ComfyUI"):
        load(path)
    bed.write(path, bed.weights(), {"config": config % "ti2v"})
    assert type(load(path)[0].model).__name__ == "WAN21"


def test_a_class_that_is_not_there(tmp_path, monkeypatch):
    model = relatives.network("HuMo")
    assert model is not None
    path = bed.write(tmp_path / "wan.safetensors", relatives.weights(model))
    monkeypatch.setattr(load_run, "structure", lambda *_: None)
    with pytest.raises(FrugalError, match=r"update ComfyUI.*audio_proj.* is Wan HuMo"):
        load(path)


def test_sizes_that_no_class_can_have(tmp_path):
    """A width of less than one head stops ComfyUI's class; here it is one sentence."""
    small = bed.weights(bed.variant(bed.T2V, dim=64, ffn_dim=128))
    path = bed.write(
        tmp_path / "wan.safetensors", small | {"face_adapter.x.weight": torch.zeros(4, 4)}
    )
    with pytest.raises(FrugalError, match="is Wan Animate"):
        load(path)
