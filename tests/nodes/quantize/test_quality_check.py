"""Calls of the original kept while it samples, and made again with a quantised model."""

from __future__ import annotations

import json
import math

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import table
from frugal.kernels.quantize import quality
from frugal.kernels.quantize.calibration import read_calibration
from frugal.kernels.quantize.request import Job
from frugal.kernels.quantize.request import run as convert
from frugal.nodes.quantize import (
    calibrate_run,
    convert_run,
    quality_check,
    quality_check_run,
    reference_calls,
)
from frugal.nodes.wan.load_run import load_wan
from frugal.tests.helpers import lora
from frugal.tests.helpers import wan as bed

STEPS = 4
KINDS = {"t2v": bed.T2V, "i2v": bed.I2V, "vace": bed.VACE}
LATENT = (1, 16, 3, 8, 8)


def loaded(folder, config=bed.T2V, seed=3):
    folder.mkdir(parents=True, exist_ok=True)
    source = bed.base(bed.weights(config, seed), torch.float32)[0]
    path = bed.write(folder / "wan.safetensors", source)
    with torch.inference_mode():
        return path, load_wan(path, "fp32")[0]


def sample(model, shape=LATENT, cfg=3.0, seed=1, clip=False, steps=STEPS):
    make = torch.Generator().manual_seed(5)
    prompts = []
    for _ in range(2):
        found = {}
        if clip:
            found["clip_vision_output"] = Look(torch.randn(1, 257, 1280, generator=make))
        prompts.append([[torch.randn(1, 12, 4096, generator=make), found]])
    start = torch.zeros(shape)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(start, seed), cfg,
            comfy.samplers.sampler_object("euler"), sigmas, *prompts, start, seed=seed,
            disable_pbar=True,
        )  # fmt: skip


class Look:
    """As much of CLIP vision's output as Wan reads."""

    def __init__(self, hidden):
        self.penultimate_hidden_states = hidden


def settings(path, **more):
    """With little memory, as the statistics are not what is tested here."""
    return calibrate_run.Settings(path, more.pop("add", False), 10**7, 64, 0, **more)


def watched(model, seen):
    """A clone whose calls of the diffusion model are written down from outside."""

    def look(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        options = next(each for each in args if isinstance(each, dict))
        named = {"x": args[0], "timestep": args[1], "context": args[2], "clip_fea": args[3]}
        named |= {key: value for key, value in kwargs.items() if key.startswith("vace")}
        seen.append((float(options["sigmas"].max()), named, out.clone()))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    return model


def checked(model, path, quality_file=None):
    with torch.inference_mode():
        return quality_check_run.check(model, path, quality_file)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(model file, its MODEL, a calibration of it, what was seen at each call)."""
    folder = tmp_path_factory.mktemp("check")
    path, model = loaded(folder / "diffusion_models")
    seen = []
    sample(calibrate_run.wrap(watched(model, seen), settings(folder / "c.safetensors")))
    return path, model, folder / "c.safetensors", seen


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", KINDS)
def test_kept_calls_are_those_of_the_run_and_come_out_the_same(kind, tmp_path):
    """The latent is small enough to stay whole, so what is kept must be what was seen."""
    _, model = loaded(tmp_path, KINDS[kind])
    seen, path = [], tmp_path / "c.safetensors"
    sample(calibrate_run.wrap(watched(model, seen), settings(path)), clip=kind == "i2v")
    calls = read_calibration(path).calls()
    sigmas = sorted({sigma for sigma, _, _ in seen}, reverse=True)
    assert [call.sigma for call in calls] == [sigmas[0], sigmas[1], sigmas[-1]]
    for call in calls:
        at = [entry for entry in seen if entry[0] == call.sigma]
        _, given, out = at[0]
        given = {name: value for name, value in given.items() if value is not None}
        assert set(call.arguments) == set(given)
        assert ("clip_fea" in given) == (kind == "i2v")
        assert ("vace_context" in given) == (kind == "vace")
        assert all(same(call.arguments[name], value) for name, value in given.items())
        assert torch.equal(call.output, out)
    error, report = checked(model, path)
    assert report is None
    assert (error.whole.relative, error.whole.cosine, error.whole.snr_db) == (0, 1, None)
    assert error.whole.numbers == sum(call.output.numel() for call in calls)


def test_a_large_latent_is_cut_and_the_picture_stays(tmp_path):
    _, model = loaded(tmp_path)
    path, shape = tmp_path / "c.safetensors", (1, 16, 6, 40, 36)
    plain = sample(model, shape, cfg=1.0, steps=2)
    wrapped = calibrate_run.wrap(model, settings(path))
    assert torch.equal(sample(wrapped, shape, cfg=1.0, steps=2), plain)
    assert len(read_calibration(path).entries) == 2
    for call in read_calibration(path).calls():
        assert call.arguments["x"].shape == (1, 16, 4, 32, 32) == call.output.shape
    assert checked(model, path)[0].whole.relative == 0


def test_figures_are_those_of_outputs_computed_directly(bench, tmp_path):
    path, _, calibration, _ = bench
    out = tmp_path / "fp8.safetensors"
    outcome = convert(Job(path, out, table.FP8, measured=True))
    with torch.inference_mode():
        quantised = load_wan(out)[0]
        error, report = quality_check_run.check(quantised, calibration, outcome.quality_file)
        calls = read_calibration(calibration).calls()
        assert quantised.model.manual_cast_dtype == torch.float32
        made = [
            quantised.model.diffusion_model(**call.arguments, transformer_options={})
            for call in calls
        ]
    expected = [bed.relative(m, call.output) for m, call in zip(made, calls, strict=True)]
    assert [call.error.relative for call in error.calls] == pytest.approx(expected, rel=1e-4)
    assert 0.005 < error.whole.relative < 0.1 and not any("rounding" in n for n in error.notes)
    assert min(expected) <= error.whole.relative <= max(expected)
    assert error.whole.snr_db == pytest.approx(-20 * math.log10(error.whole.relative))
    # The file beside the model has both now; checking again replaces the figures.
    assert report.end_to_end == error and report.layers == outcome.quality.layers
    assert quality.read_json(outcome.quality_file) == report
    assert checked(quantised, calibration, outcome.quality_file)[1] == report
    assert not list(tmp_path.glob("*.part"))


def test_added_runs_keep_their_calls_up_to_a_bound(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_calls, "MOST_CALLS", 5)
    _, model, _, _ = bench
    path = tmp_path / "c.safetensors"
    wrapped = calibrate_run.wrap(model, settings(path, add=True))
    held = []
    for run in range(3):
        sample(wrapped, seed=run, cfg=1.0)
        held.append(read_calibration(path).calls())
    assert [len(calls) for calls in held] == [3, 5, 5]
    for calls in held:
        kept = [call.output for call in held[-1]]
        assert all(same(*pair) for pair in zip([c.output for c in calls], kept, strict=False))
    assert checked(model, path)[0].whole.relative == 0


def test_loras_beside_the_layers_act_and_are_told(bench, tmp_path):
    _, model, calibration, _ = bench
    file, _ = lora.lora(["blocks.0.ffn.0", "blocks.1.self_attn.q"])
    with torch.inference_mode():
        changed, _ = lora.put(model, tmp_path, file)
    path = tmp_path / "with_lora.safetensors"
    sample(calibrate_run.wrap(changed, settings(path)))
    error, _ = checked(changed, path)
    assert error.whole.relative == 0
    told = "unmerged LoRAs: lora.safetensors; when it was recorded: lora.safetensors"
    assert told in error.notes
    for other, kept, told in (
        (changed, calibration, "lora.safetensors; when it was recorded: none"),
        (model, path, "none; when it was recorded: lora.safetensors"),
    ):
        error, _ = checked(other, kept)
        assert error.whole.relative > 0.05
        assert any(told in note for note in error.notes)
    assert not any("beside" in note for note in checked(model, calibration)[0].notes)


def test_patched_weights_and_wrappers_are_told(bench):
    _, model, calibration, _ = bench
    changed = model.clone()
    name = "diffusion_model.blocks.0.ffn.0.weight"
    held = model.model.state_dict()[name].clone()
    changed.add_patches({name: ("diff", (0.1 * torch.ones(512, 256),))})
    changed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", pytest.fail)
    error, _ = checked(changed, calibration)
    assert error.whole.relative > 0.01
    text = error.text()
    assert "1 weights are changed on the model" in text
    assert "wrappers that did not run here: diffusion_model cache" in text
    assert "recorded from wan.safetensors" in text
    # And the model is as it was.
    assert checked(model, calibration)[0].whole.relative == 0
    assert torch.equal(model.model.state_dict()[name], held)


def test_other_models_and_files_are_refused(bench, tmp_path):
    path, model, calibration, _ = bench
    for config, told in (
        (bed.variant(bed.T2V, ffn_dim=768), r"768 inputs in blocks\.0\.ffn\.2, not 512"),
        (bed.VACE, "a WAN21_Vace, not a WAN21"),
        (bed.I2V, "36 latent channels, not 16"),
        (bed.variant(bed.T2V, layers=1), r"0 inputs in blocks\.1"),
    ):
        _, other = loaded(tmp_path / str(config), config)
        with pytest.raises(FrugalError, match=told):
            checked(other, calibration)
    old = tmp_path / "old.safetensors"
    sample(calibrate_run.wrap(model, settings(old, calls=False)), cfg=1.0)
    assert not read_calibration(old).entries
    with pytest.raises(FrugalError, match=r"record it again.*holds no calls"):
        checked(model, old)
    out = tmp_path / "fp8.safetensors"
    outcome = convert(Job(path, out, table.FP8, measured=True))
    before = outcome.quality_file.read_bytes()
    with pytest.raises(FrugalError, match=r"quality file of fp8\.safetensors and a model from wan"):
        checked(model, calibration, outcome.quality_file)
    assert outcome.quality_file.read_bytes() == before


def test_a_different_model_of_the_same_shapes_is_doubted(bench, tmp_path):
    _, other = loaded(tmp_path, seed=4)
    assert "is this the model" in checked(other, bench[2])[0].notes[-1]


def test_what_cannot_be_kept_is_told_and_the_rest_recorded(bench, tmp_path):
    _, model, _, _ = bench
    said, path = [], tmp_path / "c.safetensors"

    def more(executor, *args, **kwargs):
        return executor(*args, **kwargs | {"control": {"input": []}})

    odd = model.clone()
    odd.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "more", more)
    sample(calibrate_run.wrap(odd, settings(path, say=said.append)))
    assert (
        "no calls saved for the quality check: the input control (dict) cannot be kept" in said[0]
    )
    assert read_calibration(path).inputs and not read_calibration(path).entries


def test_cancelled_check_leaves_nothing(bench, tmp_path, monkeypatch):
    path, _, calibration, _ = bench
    out = tmp_path / "fp8.safetensors"
    outcome = convert(Job(path, out, table.FP8, measured=True))
    before, cleaned, left = outcome.quality_file.read_bytes(), [], [2]
    with torch.inference_mode():
        quantised = load_wan(out)[0]

    def stop():
        left[0] -= 1
        if not left[0]:
            raise comfy.model_management.InterruptProcessingException

    quantised.add_callback("on_cleanup", lambda patcher: cleaned.append(patcher))
    with monkeypatch.context() as patched:
        patched.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            checked(quantised, calibration, outcome.quality_file)
    assert cleaned == [quantised] and outcome.quality_file.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    assert checked(quantised, calibration)[0].whole.relative > 0


def test_node(bench, tmp_path, monkeypatch):
    path, model, calibration, _ = bench
    places = {"diffusion_models": [str(tmp_path), str(path.parent)]}
    monkeypatch.setattr(convert_run.folder_paths, "get_folder_paths", lambda kind: places[kind])
    monkeypatch.setattr(quality_check, "file_path", lambda kind, name: calibration.parent / name)
    assert convert_run.quality_files() == ["none"]
    (tmp_path / "sub").mkdir()
    out = tmp_path / "sub" / "fp8.safetensors"
    convert(Job(path, out, table.FP8, measured=True))
    (name,) = convert_run.quality_files()[1:]
    assert convert_run.quality_path(name) == out.with_name("fp8.quality.json")
    with pytest.raises(FrugalError, match="refresh the list"):
        convert_run.quality_path("gone.quality.json")
    node = quality_check.FrugalQualityCheck.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        quantised = load_wan(out)[0]
        text, figures, chart = node.execute(quantised, calibration.name, name).result
        alone = node.execute(model, calibration.name, "none").result
    held = json.loads(figures)
    assert f"rel-L2 {held['whole']['relative']:.4f}" in text and "blocks.*.ffn.0" in text
    assert chart.shape == (1, 640 + 280, 1024, 3) and 0 < float(chart.mean()) < 1
    assert json.loads(alone[1])["whole"]["snr_db"] is None
    assert alone[2].shape == (1, 280, 1024, 3) and "blocks" not in alone[0]
    with pytest.raises(FrugalError, match="no calibration"):
        node.execute(model, "none", "none")
    # A calibration that was recorded again is another input, the file that it writes is not.
    state = node.fingerprint_inputs(calibration=calibration.name, quality_file=name)
    assert state and node.fingerprint_inputs(calibration="none") == ""
    assert state == node.fingerprint_inputs(calibration=calibration.name, quality_file="none")
