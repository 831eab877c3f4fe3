"""`python -m frugal.quantize`, as an installed pack has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frugal.kernels.formats import table
from frugal.kernels.quantize import command, curves
from frugal.kernels.quantize.calibration import write_calibration
from frugal.kernels.quantize.moments import Moment
from frugal.kernels.quantize.quality import read_json
from frugal.kernels.quantize.weights import Weights
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.installed import installed

pytest.importorskip("comfy_kitchen")
SMALL = bed.variant(bed.T2V, dim=64, ffn_dim=128, layers=1, text_dim=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    text = {"config": json.dumps({"transformer": {"text_dim": 64}})}
    held = bed.base(bed.weights(SMALL))[0]
    return bed.write(tmp_path_factory.mktemp("wan") / "wan.safetensors", held, text)


def test_module_runs_where_the_pack_is_installed(source, tmp_path):
    place, out = installed(tmp_path / "site"), tmp_path / "out.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(place)}
    call = [sys.executable, "-m", "frugal.quantize", str(source), str(out), "--to", "fp8"]
    run = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert "10 layers fp8" in run.stdout and "100.0 %" in run.stderr
    for layer in Weights(out).large():
        assert load_file(out)[f"{layer}.weight"].dtype == torch.float8_e4m3fn
    (tmp_path / "l.safetensors").write_bytes(b"")
    lora = ["--overwrite", "--lora", str(tmp_path / "l.safetensors")]
    run = subprocess.run([*call, *lora], capture_output=True, text=True, cwd=tmp_path,
                         env=environment)  # fmt: skip
    assert run.returncode == 1 and "--lora needs ComfyUI, and 'comfy" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_report(source, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert command.main([str(source), str(out), "--to", "int8", "--report"]) == 0
    report = read_json(tmp_path / "out.quality.json")
    assert {layer.name for layer in report.layers} == set(Weights(source).large())
    for layer in report.layers:
        exact, got = Weights(source).weight(layer.name), Weights(out).weight(layer.name)
        assert layer.relative == pytest.approx(bed.relative(got, exact), rel=1e-3)
    assert report.bytes == sum(tensor.nbytes for tensor in load_file(out).values())
    assert f"({report.bytes} bytes)" in capsys.readouterr().out


def test_budget(source, tmp_path, capsys):
    size = sum(tensor.nbytes for tensor in load_file(source).values())
    out = tmp_path / "out.safetensors"
    wanted = ["--budget", str(0.6 * size / 1e9), "--allow", "bf16,int8,awq"]
    assert command.main([str(source), str(out), *wanted]) == 0
    got = sum(tensor.nbytes for tensor in load_file(out).values())
    assert 0.55 * size < got <= 0.6 * size
    assert f"({got} bytes) in a budget of" in capsys.readouterr().out
    told = json.loads(json.loads(header(out))["__metadata__"]["frugal"])
    assert told["budget_bytes"] == round(0.6 * size) and told["allowed"][0] == table.BF16


def header(path: Path) -> str:
    raw = path.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()


def test_calibration_changes_the_codes(source, tmp_path, capsys):
    held = Weights(source)
    layer = "blocks.0.ffn.0"
    make = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 64, generator=make) @ torch.randn(64, 64, generator=make)
    total = inputs.t() @ inputs / len(inputs)
    scale = total.diagonal().sqrt()
    above = torch.triu_indices(64, 64)
    correlation = (total / scale[:, None] / scale)[above[0], above[1]].half()
    moment = Moment(len(inputs), total.diagonal().clone(), correlation)
    file = tmp_path / "c.safetensors"
    write_calibration(file, {layer: 0}, {0: moment}, {})
    plain, solved = tmp_path / "p.safetensors", tmp_path / "s.safetensors"
    command.main([str(source), str(plain), "--to", "w4a8"])
    assert command.main([str(source), str(solved), "--to", "w4a8", "--calibration", str(file)]) == 0
    assert "1 of 10 layers are calibrated, these not: " in capsys.readouterr().out
    exact = held.weight(layer).float()
    errors = []
    for path in (plain, solved):
        error = Weights(path).weight(layer) - exact
        errors.append(float((error @ total * error).sum()) ** 0.5)
    assert errors[1] < 0.7 * errors[0]
    one, two = load_file(plain), load_file(solved)
    changed = {name for name in one if not torch.equal(one[name].float(), two[name].float())}
    assert changed and all(name.startswith(f"{layer}.") for name in changed)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "fp8", "--lora", "gone.safetensors:1"], "no LoRA file gone.safetensors"),
        (["--to", "fp8", "--lora", "x:y:z"], "FILE:STRENGTH"),
        (["--budget", "1", "--allow", "int3"], "--allow names 'int3'"),
        (["--budget", "0.000001"], "the smallest size"),
    ],
)
def test_mistakes_are_one_sentence(arguments, told, source, tmp_path, capsys):
    assert command.main([str(source), str(tmp_path / "out.safetensors"), *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in error and error.endswith(".")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "fp8", "--device", "gpu"], "the device gpu cannot be used"),
        (["--to", "fp8", "--device", "meta"], "the device meta cannot be used"),
        (["--budget", "nan"], "a budget of nan GB"),
        (["--budget", "inf"], "a budget of inf GB"),
        (["--budget", "-1"], "a budget of -1 GB"),
        (["--to", "fp8", "--lora", "x.safetensors:nan"], "--lora with a strength of nan"),
    ],
)
def test_what_needs_no_measuring_is_said_at_once(
    arguments, told, source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(curves, "layer_curve", None)
    test_mistakes_are_one_sentence(arguments, told, source, tmp_path, capsys)


def test_source_and_target_of_another_kind(source, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert command.main([str(source.parent), out, "--to", "fp8"]) == 1
    assert "is a folder; expected a model file" in capsys.readouterr().err
    assert command.main([str(source), out.removesuffix(".safetensors"), "--to", "fp8"]) == 1
    assert "write to out.safetensors:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["head.head.bias", "patch_embedding.weight", "blocks.0.ffn.0.weight"]
)
@pytest.mark.parametrize("to", ["bf16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, to, bad, source, tmp_path, capsys):
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    held = load_file(source)
    held[name].view(-1)[3] = bad
    broken = bed.write(tmp_path / "broken.safetensors", held, metadata)
    out = tmp_path / "out.safetensors"
    assert command.main([str(broken), str(out), "--to", to]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in error and name.rpartition(".")[0] in error and not out.exists()


def test_source_is_not_overwritten(source, tmp_path, capsys):
    before = source.read_bytes()
    assert command.main([str(source), str(source), "--to", "fp8", "--overwrite"]) == 1
    assert "written from itself" in capsys.readouterr().err and source.read_bytes() == before


def test_interrupted_measuring_goes_on(source, tmp_path, capsys, monkeypatch):
    """Each layer is measured once, whatever happens, and the file is the same."""
    out, measured = tmp_path / "out.safetensors", []
    curve = curves.layer_curve
    monkeypatch.setattr(
        curves, "layer_curve", lambda name, *a, **k: measured.append(name) or curve(name, *a, **k)
    )
    size = sum(tensor.nbytes for tensor in load_file(source).values())
    wanted = ["--budget", str(0.6 * size / 1e9), "--allow", "bf16,int8"]
    layers = list(Weights(source).shapes)

    def stop(self, stage, done, total):
        if stage == "measure" and len(measured) == 4:
            raise KeyboardInterrupt

    kept = out.with_name(out.name + ".part.curves")
    with monkeypatch.context() as patch:
        patch.setattr(command._Bar, "_show", stop)
        assert command.main([str(source), str(out), *wanted]) == 130
    assert measured == layers[:4] and not out.exists()
    # A line torn by the kill is measured again.
    kept.write_bytes(kept.read_bytes()[:-20])
    # A size that no choice keeps is refused before anything is measured.
    assert command.main([str(source), str(out), "--budget", "0.000001", *wanted[2:]]) == 1
    assert measured == layers[:4]
    assert command.main([str(source), str(out), *wanted]) == 0
    assert measured == [*layers[:4], *layers[3:]]
    assert len(measured) == len(layers) + 1 and not kept.exists()
    plain = tmp_path / "plain.safetensors"
    assert command.main([str(source), str(plain), *wanted]) == 0
    assert out.read_bytes() == plain.read_bytes() and len(measured) == 2 * len(layers) + 1
    # Other formats or another source are other work.
    for changed in (["bf16,fp8"], ["bf16,int8"]):
        del measured[:]
        with monkeypatch.context() as patch:
            patch.setattr(command._Bar, "_show", stop)
            command.main([str(source), str(out), *wanted[:3], *changed, "--overwrite"])
        assert measured == layers[:4]
    assert kept.exists()


def test_interruption(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.safetensors"

    def stop(self, stage, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command._Bar, "_show", stop)
        assert command.main([str(source), str(out), "--to", "int8"]) == 130
    assert "the same command resumes" in capsys.readouterr().err and not out.exists()
    assert command.main([str(source), str(out), "--to", "int8"]) == 0
    assert command.main([str(source), str(tmp_path / "2.safetensors"), "--to", "int8"]) == 0
    assert out.read_bytes() == (tmp_path / "2.safetensors").read_bytes()
