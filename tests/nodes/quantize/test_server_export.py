"""The export for a server as a node: folders of models/diffusers, LoRAs, and ComfyUI's loaders on
what it wrote.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import folder_paths
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.weights import Weights
from frugal.nodes.quantize import export_run
from frugal.nodes.quantize.convert_run import NONE
from frugal.nodes.quantize.export import FrugalServerExport
from frugal.nodes.wan import load_run as wan
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import forward, loaded_weights

WIDGETS = dict(
    model_name="wan.safetensors",
    diffusers_folder=NONE,
    calibration=NONE,
    group_size="32",
    lora_name=NONE,
    lora_strength=1.0,
    folder_name="made/int4",
)


@pytest.fixture
def places(comfy_tree, tmp_path, monkeypatch):
    """Models folders of their own, a small model in them."""
    for kind in ("diffusion_models", "diffusers"):
        (tmp_path / kind).mkdir()
        held = ([str(tmp_path / kind)], folder_paths.folder_names_and_paths[kind][1])
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, held)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    path = tmp_path / "diffusion_models" / "wan.safetensors"
    bed.write(path, bed.base(bed.weights())[0])
    hidden = SimpleNamespace(unique_id=None)
    monkeypatch.setattr(FrugalServerExport, "hidden", hidden, raising=False)
    return tmp_path


def test_what_is_written_loads_in_comfyui_too(places):
    folder, report = FrugalServerExport.execute(**WIDGETS).result
    assert folder == str(places / "diffusers" / "made" / "int4")
    assert "20 layers INT4" in report and "the transformer alone" in report
    path = places / "diffusers/made/int4/transformer/diffusion_pytorch_model.safetensors"
    again = Weights(path)
    with torch.inference_mode():
        patcher = wan.load_wan(path)[0]
        got = loaded_weights(patcher)
        for layer in again.large():
            assert bed.relative(got[f"{layer}.weight"], again.weight(layer)) <= 1e-6, layer
        plain = wan.load_wan(places / "diffusion_models" / "wan.safetensors")[0]
        assert 0.01 < bed.relative(forward(patcher), forward(plain)) < 0.3


def test_the_rest_is_chosen_from_the_models(places):
    rest = places / "diffusers" / "Wan" / "T2V"
    (rest / "vae").mkdir(parents=True)
    (rest / "transformer").mkdir()
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    (rest / "model_index.json").write_text(json.dumps(index))
    (rest / "transformer" / "config.json").write_text("{}")
    assert export_run.folders() == [NONE, "Wan/T2V"]
    FrugalServerExport.execute(**WIDGETS | {"diffusers_folder": "Wan/T2V"})
    assert export_run.folders() == [NONE, "Wan/T2V", "made/int4"]
    with pytest.raises(FrugalError, match="is not there"):
        FrugalServerExport.execute(**WIDGETS | {"diffusers_folder": "gone", "folder_name": "other"})


@pytest.mark.parametrize("name", ["", " ", "../out", "/tmp/out", "."])
def test_names_stay_inside_the_models(places, name):
    with pytest.raises(FrugalError, match="type a plain name"):
        FrugalServerExport.execute(**WIDGETS | {"folder_name": name})
    assert not list((places / "diffusers").iterdir())
