"""Wan files of every layout into the ComfyUI under test: what arrives equals what the bytes say."""

from __future__ import annotations

import ctypes
from pathlib import Path

import comfy.quant_ops
import comfy.utils
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.native_formats import NATIVE, native_file, tolerance
from frugal.tests.helpers.wan_checks import check, forward, reference

SOURCE = bed.weights()
CONFIGS = {"T2V": bed.T2V, "I2V": bed.I2V}
SOURCES = {kind: bed.weights(config) for kind, config in CONFIGS.items()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layout", bed.fp8_layouts(SOURCE))
def test_float_layout_arrives_as_its_bytes_say(layout, kind, tmp_path):
    config, source = CONFIGS[kind], SOURCES[kind]
    tensors, metadata, meant = bed.fp8_layouts(source, config)[layout]()
    path = bed.write(tmp_path / "wan.safetensors", tensors, metadata)
    with torch.inference_mode():
        patcher, report = load_run.load_wan(path)
    check(patcher, meant, config)
    fp16 = reference(bed.base(source, torch.float16)[1], config)
    with torch.inference_mode():
        assert bed.correlation(forward(patcher, config), fp16) >= (
            0.99 if "e5m2" in layout or "everything" in layout else 0.999
        )
    assert patcher.attachments[REPORT_KEY] is report
    assert report.files == {"wan.safetensors": path.stat().st_size}


KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
SCALE_SHAPES = {"[rows, 1]": (-1, 1), "[rows]": (-1,)}


@pytest.mark.parametrize("shape", SCALE_SHAPES)
@pytest.mark.parametrize("declared", [False, True], ids=["bare (LightX2V)", "comfy_quant"])
def test_int8_per_row_is_exact_or_refused(shape, declared, tmp_path):
    tensors, metadata, meant = bed.int8_rows(SOURCE, SCALE_SHAPES[shape], declared)
    path = bed.write(tmp_path / "wan.safetensors", tensors, metadata)
    if "int8_tensorwise" not in KNOWN:
        with pytest.raises(FrugalError, match="20 layers in int8_tensorwise"):
            load_run.load_wan(path)
        return
    with torch.inference_mode():
        patcher, _ = load_run.load_wan(path)
    # Activations are rounded to int8 per token: a small error, and a real one.
    check(patcher, meant, tolerance=3e-2)
    with torch.inference_mode():
        assert bed.relative(forward(patcher), reference(meant)) > 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("label", [*NATIVE, "int8 ConvRot, header"])
def test_native_format_is_handed_over_or_refused(label, kind, tmp_path):
    config, source = CONFIGS[kind], SOURCES[kind]
    name, form = label.removesuffix(", header"), NATIVE[label.removesuffix(", header")][0]
    tensors, metadata, meant = native_file(
        name, source, bed.block_linears(source, config), header=label != name
    )
    path = bed.write(tmp_path / "wan.safetensors", tensors, metadata)
    if form not in KNOWN:
        with pytest.raises(FrugalError, match=f"layers in {form}"):
            load_run.load_wan(path)
        return
    with torch.inference_mode():
        patcher, report = load_run.load_wan(path)
    least = 0.98 if name == "W4A4" else 0.999
    check(patcher, meant, config, tolerance=tolerance(name), least=least)
    assert any(held.startswith(form) for held in report.formats)


class PlainMapping:
    """A file in memory in place of the mapping that needs a GPU's driver."""

    def __init__(self, path):
        self.content = ctypes.create_string_buffer(Path(path).read_bytes())

    def get(self) -> int:
        return ctypes.addressof(self.content)

    def get_file_handle(self) -> int:
        return -1


def test_mxfp8_scales_of_their_own_type_are_read_under_dynamic_loading(tmp_path, monkeypatch):
    """ComfyUI's reader for dynamic loading has no entry for the type of these scales."""
    mapping = pytest.importorskip("comfy_aimdo.model_mmap")
    memory = getattr(comfy, "memory_management", None)
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic loading")
    tensors = bed.base(SOURCE)[0]
    layer = bed.block_linears(SOURCE)[0]
    tensors |= bed.fake_native(layer, "mxfp8", *SOURCE[f"{layer}.weight"].shape)
    scales = tensors[f"{layer}.weight_scale"].view(torch.float8_e8m0fnu)
    tensors[f"{layer}.weight_scale"] = scales
    path = bed.write(tmp_path / "wan.safetensors", tensors)
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    monkeypatch.setattr(mapping, "ModelMMAP", PlainMapping)
    plain = bed.write(tmp_path / "plain.safetensors", bed.base(SOURCE)[0])
    assert len(load_run._tensors(load_run.open_source(plain))) == len(SOURCE)
    found = load_run._tensors(load_run.open_source(path))
    assert found.keys() == tensors.keys()
    held = found[f"{layer}.weight_scale"]
    assert torch.equal(held.view(torch.uint8), scales.view(torch.uint8))
    if torch.float8_e8m0fnu not in comfy.utils._TYPES.values():
        with pytest.raises(KeyError):
            comfy.utils.load_torch_file(str(path))
