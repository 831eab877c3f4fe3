"""The doctor on the real machine: its facts are those of the ComfyUI under test."""

from __future__ import annotations

import json
import sys

import comfy.quant_ops
import psutil
import pytest
import torch

from frugal.nodes.memory import doctor, doctor_run


def test_facts_of_this_machine():
    before = set(sys.modules)
    found = doctor_run.gather()
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"flash_attn", "sageattention", "xformers", "triton", "numba", "gguf"}
    assert (found.kind, found.capability) == ("cpu", None)
    assert (found.torch, found.cuda) == (torch.__version__, torch.version.cuda)
    assert set(found.formats) == set(getattr(comfy.quant_ops, "QUANT_ALGOS", {}))
    assert found.ram_total == psutil.virtual_memory().total >= found.ram_free > 0
    assert {"float8_e4m3fn"} <= set(found.emulated)
    # ComfyUI's attention on a CPU.
    assert found.active == "sub_quad" and "pytorch" in found.registered
    assert found.comfyui and found.comfyui[0].isdigit()


def test_kitchen_as_comfyui_uses_it():
    found = doctor_run.gather()
    assert found.kitchen_used == bool(getattr(comfy.quant_ops, "_CK_AVAILABLE", False))
    if not found.kitchen_used:
        assert found.backends == {}
        return
    import comfy_kitchen

    for name, state in comfy_kitchen.list_backends().items():
        ours = found.backends[name]
        assert (ours.available, ours.disabled) == (state["available"], state["disabled"])
        assert set(ours.kernels) == set(state["capabilities"])
    assert found.backends["eager"].runs("int8_linear", None)
    assert not found.backends["cuda"].runs("int8_linear", (8, 6))


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "sageattention.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor_run.importable("sageattention") and not doctor_run.importable("flash_attn")
    assert doctor_run.version_of("sageattention") == "unknown version"
    assert doctor_run.gather().attention == {"sageattention": "unknown version"}
    monkeypatch.setitem(sys.modules, "numba", None)
    assert doctor_run.gather().numba is None


def test_node_gives_text_and_data(monkeypatch):
    shown = []
    monkeypatch.setattr("frugal.nodes.memory.doctor.show_text", lambda _, text: shown.append(text))
    node = doctor.FrugalDoctor.PREPARE_CLASS_CLONE({})
    output = node.execute()
    text, data = output.args
    assert shown == [text] and "device cpu" in text
    assert json.loads(data)["facts"]["kind"] == "cpu"
    assert node.fingerprint_inputs() != node.fingerprint_inputs()


@pytest.mark.comfy
def test_doctor_on_a_server(server):
    result = server.run({"1": {"class_type": "FrugalDoctor", "inputs": {}}})
    assert (result.status, result.errors) == ("success", [])
    data = json.loads(result.outputs["1"]["frugal_doctor"][0])
    text = result.outputs["1"]["text"][0]
    assert data["facts"]["torch"] in text and "hours on a CPU" in text
    assert len(data["models"]) >= 3 * 2 * 2 + 3
    assert all(each["in_ram"] for each in data["models"])
