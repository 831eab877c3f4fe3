"""Recording a model's inputs while it samples, and what it is good for."""

from __future__ import annotations

import comfy.model_management
import comfy.quant_ops
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, table
from frugal.kernels.quantize.calibration import read_calibration
from frugal.kernels.quantize.on_load import INT8_CONVROT
from frugal.nodes.quantize import calibrate, calibrate_run, convert_run, cropped_calls
from frugal.nodes.quantize import sensitivity as shares
from frugal.nodes.quantize import token_sampler as rows_module
from frugal.nodes.quantize.calibrate import ADD, REPLACE, FrugalCalibrate
from frugal.nodes.wan.load_run import load_wan
from frugal.tests.helpers import wan as bed

STEPS = 3
EVERYTHING = 10**6
# 4096 inputs: left out where every matrix is compared.
WIDE = {"text_embedding.0"}
KNOWN = getattr(comfy.quant_ops, "QUANT_ALGOS", {})


@pytest.fixture(scope="module")
def source():
    return bed.base(bed.weights(seed=3), torch.float32)[0]


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = bed.write(tmp_path_factory.mktemp("model") / "wan.safetensors", source)
    with torch.inference_mode():
        return load_wan(path, "fp32")[0]


@pytest.fixture(scope="module")
def prompts():
    make = torch.Generator().manual_seed(5)
    return [[[torch.randn(1, 12, 4096, generator=make), {}]] for _ in range(2)]


def sample(model, prompts, seed=1, sampler="euler", cfg=3.0, **more):
    start = torch.zeros(1, 16, 3, 8, 8)
    noise = comfy.sample.prepare_noise(start, seed)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, comfy.samplers.sampler_object(sampler), sigmas, *prompts, start,
            seed=seed, disable_pbar=True, **more,
        )  # fmt: skip


def recorded(
    model, path, *, add=False, memory=10**9, rows=EVERYTHING, seed=0, said=None, shares=False
):
    say = (lambda text: None) if said is None else said.append
    return calibrate_run.wrap(
        model, calibrate_run.Settings(path, add, memory, rows, seed, say, shares)
    )


def hooks_of(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


@pytest.fixture(scope="module")
def witnessed(model, prompts):
    """What every layer gets, looked at from outside: layer -> list of inputs [rows, in]."""
    seen, handles = {}, []
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def look(_, given, name=name):
                rows = given[0].detach().reshape(-1, given[0].shape[-1])
                seen.setdefault(name, []).append(rows.clone())

            handles.append(module.register_forward_pre_hook(look))
    out = sample(model, prompts)
    for handle in handles:
        handle.remove()
    return out, {name: torch.cat(rows) for name, rows in seen.items()}


def test_statistics_are_those_of_what_the_layers_get(model, prompts, witnessed, tmp_path):
    out, seen = witnessed
    path, said = tmp_path / "deep" / "wan.safetensors", []
    wrapped = recorded(model, path, said=said)
    assert torch.equal(sample(wrapped, prompts), out)
    assert hooks_of(model) == 0
    found = read_calibration(path)
    assert set(found.inputs) == set(seen) and len(seen) == 20 + 6
    for name, rows in seen.items():
        statistics = found.layer(name)
        rows = rows.unique(dim=0)
        assert statistics.rows == len(rows), name
        if name in WIDE:
            continue
        meant = rows.double().t() @ rows.double() / len(rows)
        scale = meant.diagonal().sqrt().clamp(min=1e-12)
        wrong = (statistics.hessian() - meant) / scale / scale[:, None]
        assert float(wrong.abs().max()) < 2e-3, name
    # q, k and v read one input; the text is one input of all blocks.
    groups = {}
    for name, index in found.inputs.items():
        groups.setdefault(index, set()).add(name)
    text = {f"blocks.{block}.cross_attn.{part}" for block in range(2) for part in "kv"}
    assert text in groups.values()
    assert {f"blocks.1.self_attn.{part}" for part in "qkv"} in groups.values()
    assert len(groups) == 26 - 2 * 2 - 3
    # Tokens of the latent (3 frames of 4 x 4) come again at each step; times are different ones.
    assert found.layer("blocks.1.ffn.0").rows == 2 * STEPS * 48
    assert found.layer("blocks.1.ffn.0").independent == 48
    assert found.layer("head.head").independent == 48
    for name in ("time_embedding.0", "time_projection.1"):
        assert found.layer(name).rows == found.layer(name).independent == STEPS
    assert found.layer("text_embedding.2").independent == 12
    # The text comes at every call and counts once: 12 tokens of each of two prompts.
    assert found.layer("blocks.0.cross_attn.k").rows == 24
    assert "26 layers with 19 different inputs, 19 kept whole" in said[0]
    assert found.meta["runs"] == 1 and found.meta["models"][0]["files"]


@pytest.mark.parametrize(("sampler", "cfg"), [("euler", 1.0), ("uni_pc", 4.0), ("heun", 4.0)])
def test_the_picture_stays_the_same_and_clones_see_nothing(model, prompts, tmp_path, sampler, cfg):
    path = tmp_path / "wan.safetensors"
    wrapped = recorded(model, path, rows=40)
    plain = sample(model, prompts, sampler=sampler, cfg=cfg)
    assert not path.exists()
    assert torch.equal(sample(wrapped, prompts, sampler=sampler, cfg=cfg), plain)
    written = path.read_bytes()
    path.unlink()
    # The same run gives the same file, also on a clone; the model itself stays unwrapped.
    assert torch.equal(sample(wrapped.clone(), prompts, sampler=sampler, cfg=cfg), plain)
    assert path.read_bytes() == written
    assert calibrate_run.KEY not in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    counted = read_calibration(path)
    calls = counted.meta["calls"]
    # 40 of the 48 tokens at each call, others at the next: more than 40 in all, never above 48.
    assert 40 < counted.layer("blocks.0.ffn.0").independent <= 48
    assert counted.layer("blocks.0.ffn.0").rows == 40 * calls


def test_the_seed_chooses_the_rows(model, prompts, witnessed, tmp_path):
    _, seen = witnessed
    files = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.safetensors"
        sample(recorded(model, path, rows=16, seed=seed), prompts)
        files.append(read_calibration(path).layer("blocks.0.ffn.0").hessian())
    assert not torch.equal(*files)
    whole = seen["blocks.0.ffn.0"]
    meant = whole.t() @ whole / len(whole)
    for each in files:
        assert bed.relative(each, meant) < 0.35


def test_rows_that_come_again_count_once():
    rows = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    rows[29] *= 1e6
    again = torch.cat([rows, rows[5:20], rows[3:4] * (1 + 1e-8), 0 * rows[:4]])
    found = rows_module.distinct(again)
    assert torch.equal(found, torch.cat([rows, 0 * rows[:1]]))
    assert torch.equal(rows_module.distinct(rows), rows)
    other = torch.cat([rows, 2 * rows[:1], -rows[:1]])
    assert torch.equal(rows_module.distinct(other), other)
    broken = torch.cat([rows, torch.full((2, 64), torch.nan)])
    assert rows_module.distinct(broken).shape == broken.shape


class StoppedError(BaseException):
    pass


@pytest.mark.parametrize("stop", [StoppedError, RuntimeError, "interrupt"])
def test_no_file_and_no_trace_of_a_run_cut_short(model, prompts, tmp_path, stop):
    path = tmp_path / "wan.safetensors"
    wrapped = recorded(model, path)
    expected = comfy.model_management.InterruptProcessingException if stop == "interrupt" else stop

    def callback(step, *_):
        if step == 1:
            raise expected()

    with pytest.raises(expected):
        sample(wrapped, prompts, callback=callback)
    assert not path.exists() and not list(tmp_path.iterdir())
    assert hooks_of(model) == 0
    out = sample(wrapped, prompts)
    assert torch.equal(out, sample(model, prompts))
    # Nothing of the first run is in the file of the second.
    assert read_calibration(path).meta["calls"] in (STEPS, 2 * STEPS)


def test_runs_add_up(model, prompts, tmp_path):
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    sample(recorded(model, one), prompts, seed=1)
    sample(recorded(model, two), prompts, seed=2)
    wrapped = recorded(model, both, add=True)
    sample(wrapped, prompts, seed=1)
    assert both.read_bytes() == one.read_bytes()
    sample(wrapped, prompts, seed=2)
    parts, whole = [read_calibration(path) for path in (one, two)], read_calibration(both)
    assert whole.meta["runs"] == 2 and len(whole.meta["models"]) == 1
    assert dict(whole.inputs).keys() == dict(parts[0].inputs).keys()
    for name in {*whole.inputs} - WIDE:
        counted = [part.layer(name) for part in parts]
        rows = [each.rows for each in counted]
        meant = sum(r * each.hessian() for r, each in zip(rows, counted, strict=True)) / sum(rows)
        assert whole.layer(name).rows == sum(rows)
        assert whole.layer(name).independent == sum(each.independent for each in counted)
        assert bed.relative(whole.layer(name).hessian(), meant) < 2e-3, name
    sample(recorded(model, both, add=False), prompts, seed=2)
    assert both.read_bytes() == two.read_bytes()


def test_shares_are_measured_once_and_leave_no_trace(model, prompts, witnessed, tmp_path):
    path, plain, said = tmp_path / "wan.safetensors", tmp_path / "plain.safetensors", []
    held = {name: value.clone() for name, value in model.model.state_dict().items()}
    wrapped = recorded(model, path, add=True, said=said, shares=True)
    assert torch.equal(sample(wrapped, prompts), witnessed[0])
    sample(recorded(model, plain), prompts)
    one, without = read_calibration(path), read_calibration(plain)
    assert set(one.shares.layers) == set(one.inputs) and one.shares.runs == 1
    assert all(share > 0 for share in one.shares.layers.values())
    assert "measured for 26 layers" in said[0]
    # The runs of the measurement are not counted as inputs; a file without shares is read too.
    assert one.meta == without.meta and one.rows == without.rows
    assert not without.shares.layers
    sample(wrapped, prompts, seed=2)
    sample(recorded(model, plain, add=False, shares=True), prompts, seed=2)
    both, two = read_calibration(path).shares, read_calibration(plain).shares
    assert both.runs == 2
    for name, share in both.layers.items():
        assert share == pytest.approx((one.shares.layers[name] + two.layers[name]) / 2)
    assert hooks_of(model) == 0
    now = model.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in held.items())


def test_a_measurement_that_is_cancelled_leaves_nothing(model, prompts, tmp_path, monkeypatch):
    path, left, cancelled = tmp_path / "wan.safetensors", [5], []

    def stop():
        left[0] -= 1
        if not left[0]:
            cancelled.append(True)
            raise comfy.model_management.InterruptProcessingException

    wrapped = recorded(model, path, shares=True)
    with monkeypatch.context() as patched:
        patched.setattr(shares, "check_cancelled", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(wrapped, prompts)
    assert cancelled and hooks_of(model) == 0 and not list(tmp_path.iterdir())
    sample(wrapped, prompts)
    assert read_calibration(path).shares.runs == 1


def test_large_inputs_are_cut_before_measuring():
    size = (21, 60, 104)
    cut = cropped_calls._cut(torch.zeros(2, 36, *size), size)
    assert cut.shape == (2, 36, 4, 32, 32)
    assert cut.shape[2] * cut.shape[3] * cut.shape[4] // 4 <= cropped_calls.MOST_TOKENS
    vace = cropped_calls._cut([torch.zeros(1, 2, 96, *size), torch.zeros(1, 16, 60, 104)], size)
    assert [each.shape[-3:] for each in vace] == [(4, 32, 32), (16, 32, 32)]
    assert cropped_calls._cut(torch.zeros(2, 21), size).shape == (2, 4)
    text = torch.zeros(1, 512, 4096)
    assert cropped_calls._cut(text, size) is text


def test_another_models_file_is_not_added_to(model, prompts, tmp_path):
    other = bed.variant(bed.T2V, ffn_dim=768)
    path = bed.write(tmp_path / "other.safetensors", bed.base(bed.weights(other), torch.float32)[0])
    with torch.inference_mode():
        patcher = load_wan(path, "fp32")[0]
    target = tmp_path / "calibration.safetensors"
    sample(recorded(patcher, target), prompts)
    before, steps = target.read_bytes(), []
    with pytest.raises(FrugalError, match=r"another model \(blocks\.0\.ffn\.2\)"):
        sample(recorded(model, target, add=True), prompts, callback=lambda *a: steps.append(a))
    assert target.read_bytes() == before and not steps


def test_little_memory_makes_sketches(model, prompts, witnessed, tmp_path):
    _, seen = witnessed
    path, said = tmp_path / "wan.safetensors", []
    widths = {"blocks.0.ffn.0": 256, "blocks.1.ffn.2": 512}
    sample(recorded(model, path, memory=2_000_000, said=said), prompts)
    found = read_calibration(path)
    columns = found.meta["columns"]
    assert 16 <= columns < 256 and f"as {columns // 2} directions" in said[0]
    for name, width in widths.items():
        moment = found.moment(found.inputs[name])
        assert moment.factor.shape == (width, columns // 2)
        rows = seen[name]
        meant = rows.t() @ rows / len(rows)
        diagonal = torch.diag(meant.diagonal())
        close = bed.relative(found.layer(name).hessian(), meant)
        assert close < 0.9 * bed.relative(diagonal, meant)
    with pytest.raises(FrugalError, match="allow more memory"):
        sample(recorded(model, path, memory=10_000), prompts)


@pytest.mark.parametrize("kind", ["in place", "chunks", "other for k"])
def test_sharing_is_by_what_layers_get(model, kind, tmp_path):
    """The same memory with other contents is another input."""
    recording = calibrate_run.Recording(
        model, calibrate_run.Settings(tmp_path / "wan.safetensors", False, 10**9, EVERYTHING, 0)
    )
    block = model.model.diffusion_model.blocks[0].self_attn
    make = torch.Generator().manual_seed(1)
    given = {"q": [], "k": [], "v": []}
    for call in range(2):
        x = torch.randn(1, 40, 256, generator=make)
        with torch.inference_mode(), recording.watching(model.model.diffusion_model):
            for part in given:
                pieces = [x]
                if kind == "in place" and part == "k":
                    x.mul_(2)
                elif kind == "chunks":
                    pieces = list(x.chunk(2, dim=1))
                elif kind == "other for k" and part == "k" and call == 1:
                    pieces = [x + 1]
                for piece in pieces:
                    given[part].append(piece.clone())
                    getattr(block, part)(piece)
    inputs = {part: recording.inputs[f"blocks.0.self_attn.{part}"] for part in given}
    for part, pieces in given.items():
        if kind == "other for k" and part == "k":
            pieces = pieces[1:]
        rows = torch.cat([piece.reshape(-1, 256) for piece in pieces])
        moment = recording.gatherers[inputs[part]].moment(part)
        assert moment.rows == len(rows)
        assert bed.relative(moment.dense(), rows.t() @ rows / len(rows)) < 2e-3
    assert (inputs["q"] == inputs["k"]) == (kind == "chunks")
    assert recording.parted == (kind == "other for k")


@pytest.mark.skipif("int8_tensorwise" not in KNOWN, reason="this ComfyUI has no int8")
def test_a_quantised_model_can_be_recorded(model, source, prompts, witnessed, tmp_path):
    """Also the layer that ComfyUI computes without calling it."""
    _, seen = witnessed
    file = bed.write(tmp_path / "wan.safetensors", source)
    with torch.inference_mode():
        quantised = load_wan(file, "default", INT8_CONVROT)[0]
    path = tmp_path / "calibration.safetensors"
    out = sample(recorded(quantised, path), prompts)
    assert torch.equal(out, sample(quantised, prompts))
    found = read_calibration(path)
    assert set(found.inputs) == set(seen)
    for name in ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.2", "blocks.1.self_attn.o"):
        rows = seen[name].unique(dim=0)
        assert bed.relative(found.layer(name).hessian(), rows.t() @ rows / len(rows)) < 0.1, name
        assert found.layer(name).rows == len(rows)


def test_what_cannot_be_recorded_is_refused(model, prompts, tmp_path, monkeypatch):
    path = tmp_path / "wan.safetensors"
    wrapped = recorded(model, path)
    with pytest.raises(FrugalError, match="recorded already"):
        recorded(wrapped, path)
    compiled = recorded(model, path)
    compiled.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL,
        calibrate_run.COMPILE_KEY,
        lambda executor, *a, **k: executor(*a, **k),
    )
    with pytest.raises(FrugalError, match="is compiled"):
        sample(compiled, prompts)
    monkeypatch.setattr(model.model.diffusion_model.blocks[0], "_orig_mod", 1, raising=False)
    with pytest.raises(FrugalError, match="is compiled"):
        sample(wrapped, prompts)


def test_inputs_that_are_not_finite_are_refused(model, prompts, tmp_path):
    path = tmp_path / "wan.safetensors"
    broken = [[[torch.full((1, 12, 4096), torch.nan), {}]]] * 2
    with pytest.raises(FrugalError, match="not finite"):
        sample(recorded(model, path), broken)
    assert not path.exists() and hooks_of(model) == 0


def test_node(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        calibrate.folder_paths, "get_folder_paths", lambda kind: [str(tmp_path / kind)]
    )
    node = FrugalCalibrate.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    [wrapped] = node.execute(model, "sub/mine", REPLACE, 1.0, 64, 0).result
    sample(wrapped, prompts)
    path = tmp_path / convert_run.CALIBRATION / "sub" / "mine.safetensors"
    assert read_calibration(path).meta["runs"] == 1
    [wrapped] = node.execute(model, "sub/mine.safetensors", ADD, 1.0, 64, 0).result
    sample(wrapped, prompts)
    assert read_calibration(path).meta["runs"] == 2
    for name in ("", "  ", "../mine", "/mine"):
        with pytest.raises(FrugalError, match="the name"):
            node.execute(model, name, ADD, 1.0, 64, 0)


def test_calibrated_models_are_closer_on_other_noise(model, source, prompts, tmp_path):
    """From a run of an ordinary sampler to the output of the whole model, on noise it never saw."""
    pytest.importorskip("comfy_kitchen")
    target, path = table.W4A8_G64, tmp_path / "wan.safetensors"
    for seed in (11, 12):
        sample(recorded(model, path, add=True), prompts, seed=seed)
    found = read_calibration(path)
    changed = {}
    for calibrated in (False, True):
        weights = dict(source)
        for name in bed.block_linears(source):
            if not name.endswith(("ffn.0", "ffn.2", "self_attn.v", "self_attn.o")):
                continue
            weight = source[f"{name}.weight"]
            statistics = found.layer(name) if calibrated else None
            made = codec.encode(target, weight, "cpu", statistics=statistics)
            weights[f"{name}.weight"] = codec.decode(target, made, None, tuple(weight.shape))
        changed[calibrated] = weights
    meant = sample(model, prompts, seed=99)
    errors = {}
    for key, weights in changed.items():
        with torch.inference_mode():
            other = load_wan(bed.write(tmp_path / f"{key}.safetensors", weights), "fp32")[0]
        errors[key] = bed.relative(sample(other, prompts, seed=99), meant)
    assert 0 < errors[True] < 0.8 * errors[False]
