"""Compiled blocks in ComfyUI: same video, weights still streamed, patches in force, no traces.

What is traced is the same for every backend of torch.compile; these tests take one that needs no
C++ compiler. `test_inductor` is the one that does.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.errors import FrugalError
from frugal.nodes.causal import model_run
from frugal.nodes.memory import cross_kv_run
from frugal.nodes.sampling import attention_run, compile_run, sampler_run, step_cache_run
from frugal.nodes.sampling.compile import FrugalCompile
from frugal.nodes.wan import load_run
from frugal.tests.helpers import sampling
from frugal.tests.helpers import wan as wan_bed
from frugal.tests.helpers.flows import relative

pytestmark = pytest.mark.usefixtures("inference")
CPU = torch.device("cpu")
EAGER, WHOLE = "eager", "aot_eager"
STEPS = 3


@pytest.fixture
def fresh(monkeypatch):
    """No graphs from the tests before."""
    monkeypatch.setattr(compile_run, "_graphs", {})


def compiled(model, backend=EAGER):
    reports = []
    return compile_run.apply(model, reports.append, backend), reports


def sample(model, prompts, steps=STEPS, **more):
    return sampling.sample(model, prompts, steps, **more)


def network_of(model):
    return model.model.diffusion_model


def call(model, config=wan_bed.T2V, run=None, size=8, **patches):
    """One forward of the network itself, compiled in `run` or as it is."""
    net = network_of(model)
    dtype = model.model_dtype()
    given = wan_bed.inputs(config)
    if size != 8:
        given["x"] = torch.randn(1, config.in_dim, 2, size, size)
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    table = {} if run is None else {WrappersMP.DIFFUSION_MODEL: {compile_run.KEY: [run]}}
    return net(**given, transformer_options={"wrappers": table, "patches": patches})


def streamed(model):
    """The model with every weight left where it is, to be cast and patched layer by layer."""
    model.patch_model(CPU, lowvram_model_memory=64)
    assert model.model.model_lowvram
    return model


def loaded_again(model, *_, **__):
    """What ComfyUI does for another set of patches, but with every weight left where it is."""
    model.unpatch_model(CPU)
    streamed(model)


def untouched(model):
    return not any(
        "forward" in vars(module)
        for block in compile_run.blocks_of(network_of(model))
        for module in block.modules()
    )


def test_one_graph_serves_all_blocks_steps_and_runs(wan, prompts, fresh):
    want = sample(wan, prompts)
    model, reports = compiled(wan)
    assert relative(sample(model, prompts), want) < 1e-6
    assert (
        relative(sample(model, prompts, sampler="heun"), sample(wan, prompts, sampler="heun"))
        < 1e-6
    )
    again, more = compiled(wan)
    assert relative(sample(again, prompts), want) < 1e-6
    assert [each.graphs for each in (*reports, *more)] == [1, 0, 0]
    assert reports[0].calls == 2 * STEPS and reports[0].uncompiled == {}
    assert untouched(wan) and torch.equal(sample(wan, prompts), want)


def test_another_size_makes_one_more_graph_and_further_sizes_none(wan, fresh):
    comfy.model_management.load_models_gpu([wan])
    run = compile_run._Run(EAGER)
    made = []
    for size in (8, 12, 16, 20):
        torch.manual_seed(size)
        want = call(wan, size=size)
        torch.manual_seed(size)
        assert relative(call(wan, run=run, size=size), want) < 1e-6
        made.append(run.report.graphs)
    assert made == [1, 2, 2, 2]


@pytest.mark.parametrize("config", [wan_bed.I2V, wan_bed.VACE], ids=["i2v", "vace"])
def test_variants(tmp_path, config):
    path = wan_bed.write(tmp_path / "wan.safetensors", wan_bed.weights(config))
    model = load_run.load_wan(path, "fp32")[0]
    comfy.model_management.load_models_gpu([model])
    run = compile_run._Run(WHOLE)
    assert relative(call(model, config, run), call(model, config)) < 1e-6
    assert run.report.calls == config.layers + config.vace_layers
    assert untouched(model)


LAYOUTS = {
    "bf16": lambda: (wan_bed.base(wan_bed.weights())[0], {}),
    "fp8, scaled": lambda: wan_bed.scaled(wan_bed.weights(), wan_bed.E4, scale_name="weight_scale"),
    "int8 rows": lambda: wan_bed.int8_rows(wan_bed.weights(), declared=True),
    "GPTQ": lambda: wan_bed.gptq_or_awq(wan_bed.weights()),
}


@pytest.mark.parametrize("held", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_files(tmp_path, layout, held):
    tensors, metadata, *_ = LAYOUTS[layout]()
    path = wan_bed.write(tmp_path / "wan.safetensors", tensors, metadata)
    if layout == "int8 rows" and not hasattr(comfy.ops, "TensorWiseINT8Layout"):
        pytest.skip("this ComfyUI does not load the layout")
    model = load_run.load_wan(path)[0]
    model.patch_model(CPU, lowvram_model_memory=0 if held else 64)
    want = call(model)
    run = compile_run._Run(WHOLE)
    assert relative(call(model, run=run), want) < 1e-2
    assert run.report.calls == 2 and run.report.uncompiled == {}


def test_weights_are_streamed_as_without_compiling(wan, monkeypatch):
    """Every layer asks ComfyUI for its weight at every call, and none gets into the graph."""
    model = streamed(wan.clone())
    casts: list[str] = []
    names = {module: name for name, module in network_of(model).named_modules()}
    cast = comfy.ops.cast_bias_weight
    monkeypatch.setattr(
        comfy.ops, "cast_bias_weight",
        lambda layer, *args, **kwargs: casts.append(names[layer]) or cast(layer, *args, **kwargs),
    )  # fmt: skip
    want = call(model)
    asked = sorted(casts)
    casts.clear()
    inputs = []
    eager = torch._dynamo.lookup_backend(EAGER)
    monkeypatch.setattr(
        torch._dynamo,
        "lookup_backend",
        lambda _: lambda graph, given: inputs.extend(given) or eager(graph, given),
    )
    run = compile_run._Run("any")
    assert relative(call(model, run=run), want) < 1e-6
    assert sorted(casts) == asked and len(asked) > 20
    held = {id(each): name for name, each in network_of(model).named_parameters()}
    assert {held[id(each)] for each in inputs if id(each) in held} == {"blocks.0.modulation"}
    model.unpatch_model()


@pytest.mark.parametrize("low", [False, True], ids=["resident", "streamed"])
def test_loras_change_between_runs_without_a_new_graph(wan, prompts, low, fresh, monkeypatch):
    patches = {
        "diffusion_model.blocks.1.self_attn.q.weight": (torch.randn(256, 256),),
        "diffusion_model.blocks.0.cross_attn.norm_q.weight": (torch.randn(256),),
        "diffusion_model.blocks.0.modulation": (torch.randn(1, 6, 256),),
    }
    if low:
        patches.pop("diffusion_model.blocks.0.modulation")
    model, reports = compiled(wan)
    changed = model.clone()
    changed.add_patches(patches, 0.5)
    plain = wan.clone()
    plain.add_patches(patches, 0.5)
    if low:
        for each in (model, changed, plain, wan):
            monkeypatch.setattr(each, "partially_load", partial(loaded_again, each))
    before = sample(model, prompts)
    after = sample(changed, prompts)
    assert relative(after, before) > 0.01
    assert relative(after, sample(plain, prompts)) < 1e-6
    assert relative(sample(model, prompts), sample(wan, prompts)) < 1e-6
    assert reports[0].graphs == 1 and sum(each.graphs for each in reports[1:]) <= (0 if low else 1)


def test_nothing_stays_after_an_error_or_a_cancel(wan, prompts):
    model, reports = compiled(wan)

    def stop(step, *_):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, prompts, callback=stop)
    assert untouched(wan) and reports == []
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, prompts)
    comfy.model_management.interrupt_current_processing(False)
    assert untouched(wan)
    assert relative(sample(model, prompts), sample(wan, prompts)) < 1e-6


def test_overrides_of_attention_stay_in_force_and_see_the_runs_options(wan, prompts):
    seen = []

    def halved(func, q, k, v, *args, transformer_options, **kwargs):
        seen.append(float(transformer_options["sigmas"][0]))
        return func(q, k, 0.5 * v, *args, transformer_options=transformer_options, **kwargs)

    other = wan.clone()
    other.model_options["transformer_options"][attention_run.ATTENTION_OVERRIDE] = halved
    want = sample(other, prompts)
    plain, seen[:] = list(seen), []
    model, reports = compiled(other)
    assert relative(sample(model, prompts), want) < 1e-6 < relative(want, sample(wan, prompts))
    assert seen == plain and reports[0].uncompiled == {}


def test_attention_is_measured_inside_compiled_blocks(wan, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_run, "choices_file", lambda: tmp_path / "attention.json")
    model, _ = compiled(attention_run.apply(wan))
    assert relative(sample(model, prompts), sample(wan, prompts)) < 1e-4
    rows = model.get_attachment(attention_run.KEY).table.rows
    assert {row.source for row in rows} == {"measured"}
    assert sum(row.calls for row in rows) == 2 * 2 * STEPS


def test_together_with_what_changes_layers_and_calls(wan, prompts):
    """The cross-attention cache puts forwards on layers, the step cache leaves out calls."""
    cached = cross_kv_run.apply(wan, cross_kv_run.Options(), lambda _: None)[0]
    cached = step_cache_run.apply(cached, step_cache_run.Options(0.3, 0.0, 1.0), lambda _: None)
    want = sample(cached, prompts, 8)
    model, reports = compiled(cached)
    assert relative(sample(model, prompts, 8), want) < 1e-6
    assert reports[0].calls % 2 == 0 and reports[0].uncompiled == {}


def test_blocks_with_a_patch_in_their_midst_run_as_they_are_and_the_report_says_so(wan):
    comfy.model_management.load_models_gpu([wan])
    run = compile_run._Run(EAGER)
    patch = {"attn1_patch": [lambda given: 2 * given["x"]]}
    assert torch.equal(call(wan, run=run, **patch), call(wan, **patch))
    assert (run.report.calls, run.report.uncompiled) == (0, {"attn1_patch": 2})
    assert "2 calls of blocks ran uncompiled because of attn1_patch" in run.report.text()


def test_a_causal_model_is_refused_before_a_step(wan, prompts):
    causal, _ = model_run.make_causal(wan, model_run.CacheOptions(), 0.0)
    model, _ = compiled(causal)
    with pytest.raises(FrugalError, match=r"self_attn .* was changed by another node"):
        sample(model, prompts)
    # ComfyUI leaves the methods that it puts back on the instances.
    assert relative(sample(compiled(wan)[0], prompts), sample(wan, prompts)) < 1e-6


def test_two_nodes_that_compile_are_refused(wan, prompts):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    both = wan.clone()
    set_torch_compile_wrapper(both, EAGER)
    with pytest.raises(FrugalError, match="two nodes compile this model"):
        sample(compiled(both)[0], prompts)


def test_a_plan_in_pieces_is_refused(wan, prompts):
    from frugal.nodes.memory.planned_run import plan_run

    latent = {"samples": sampling.latent_of()}
    planned = plan_run(wan, latent, True).model
    for both in (compiled(planned)[0], plan_run(compiled(wan)[0], latent, True).model):
        with pytest.raises(FrugalError, match="remove Memory Plan, or turn compiling off"):
            sample(both, prompts)


def test_other_models_are_refused():
    inner = SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2))
    with pytest.raises(FrugalError, match="the model is a Linear; expected a Wan model"):
        compiled(SimpleNamespace(model=inner))


def test_the_sampler_and_the_node(wan, prompts, monkeypatch):
    monkeypatch.setattr(compile_run, "INDUCTOR", EAGER)
    monkeypatch.setattr(compile_run.apply, "__defaults__", (lambda _: None, EAGER))
    job = sampler_run.Job(7, STEPS, 3.0, "euler", "simple", 1.0)
    latent = {"samples": sampling.latent_of()}
    want, report = sampler_run.run(wan, *prompts, latent, job)
    assert report.compiled is None
    job = sampler_run.Job(7, STEPS, 3.0, "euler", "simple", 1.0, compile_blocks=True)
    got, report = sampler_run.run(wan, *prompts, latent, job)
    assert relative(got["samples"], want["samples"]) < 1e-6
    assert report.compiled.calls == 2 * STEPS and "compiled blocks: 6 calls" in report.text()
    assert '"compiled": {"calls": 6' in report.json()
    by_preset, report = sampler_run.run(wan, *prompts, latent, replace(job, preset="quality"))
    assert report.compiled.calls and torch.isfinite(by_preset["samples"]).all()
    assert report.memory is None and "no memory plan: compiled blocks run whole" in report.text()
    node = FrugalCompile.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    (model,) = node.execute(wan).args
    got, report = sampler_run.run(model, *prompts, latent, job)
    assert report.compiled.calls == 2 * STEPS
    assert compile_run.present(model) and not compile_run.present(wan)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor(wan, prompts):
    model, reports = compiled(wan, compile_run.INDUCTOR)
    assert relative(sample(model, prompts), sample(wan, prompts)) < 1e-5
    assert reports[0].calls == 2 * STEPS
