"""The memory plan of a causal model: what it predicts is what a run takes, and the run is the
same.
"""

from __future__ import annotations

import json

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.errors import FrugalError
from frugal.kernels.memory import chunks
from frugal.kernels.memory.plan import CAUSAL_KV, LATENTS, SAMPLE, WORK, Job, MemoryOptions
from frugal.kernels.memory.trace import trace
from frugal.nodes._comfy import CAUSAL_NEEDS_KEY
from frugal.nodes.memory import memory_plan_run, meta_models, policy
from frugal.nodes.memory.memory_plan import FrugalMemoryPlan
from frugal.tests.helpers import causal as videos

CPU, BLOCK, SIDE = torch.device("cpu"), 2, 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = videos.load(tmp_path_factory.mktemp("causal_memory"))
    videos.fused(model)
    return model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 8)
    monkeypatch.setattr(meta_models, "TEXT_TOKENS", videos.WORDS)


def job_of(frames: int, guided: bool) -> Job:
    return Job(SIDE * 8, SIDE * 8, 4 * frames - 3, 1, guided)


def run(model, frames, cfg=1.0):
    return videos.run(model, frames, BLOCK, SIDE, cfg)


def sampling(plan):
    (phase,) = (each for each in plan.phases if each.name == SAMPLE)
    return phase.parts


@pytest.mark.counts_memory
@pytest.mark.parametrize(
    ("options", "cfg"),
    [
        ({"window": 6, "sink": 2, "relative": True}, 3.0),
        ({"window": 6, "kind": "int8", "relative": True}, 3.0),
        ({"window": 6, "kind": "fp8"}, 1.0),
        ({"window": 6, "way": "chunked"}, 1.0),
        ({}, 1.0),
    ],
    ids=["guided", "int8", "fp8", "chunked", "all kept"],
)
def test_predicted_memory_is_that_of_a_run(plain, options, cfg):
    frames = 12
    model = videos.causal(plain, **options)
    plan, _ = memory_plan_run.plan_of(model, job_of(frames, cfg != 1), 0, block=BLOCK)
    parts = sampling(plan)
    predicted = parts[WORK] + parts[CAUSAL_KV] + parts[LATENTS]
    counted = trace(lambda: run(model, frames, cfg), decomposed=meta_models.kernels(CPU)[0]).peak
    assert predicted == pytest.approx(counted, rel=0.03)
    assert parts[CAUSAL_KV] > 0.05 * counted and parts[WORK] > 0.2 * counted


def test_a_window_bounds_it_and_the_block_sets_it(plain):
    def parts(frames, block=BLOCK, **options):
        model = videos.causal(plain, **options)
        return sampling(memory_plan_run.plan_of(model, job_of(frames, True), 0, block=block)[0])

    long, longer = parts(12, window=4), parts(24, window=4)
    assert (long[WORK], long[CAUSAL_KV]) == (longer[WORK], longer[CAUSAL_KV])
    assert longer[LATENTS] > long[LATENTS]
    assert parts(24)[CAUSAL_KV] == 2 * parts(12)[CAUSAL_KV] > 2 * long[CAUSAL_KV]
    assert parts(12, block=4, window=4)[WORK] > long[WORK]
    hosted = parts(12, window=4, on_host=True)
    # Two layers of the two frames that are read, for each side.
    assert (hosted[CAUSAL_KV], hosted[WORK]) == (2 * 2 * 2 * 64 * 256 * 4 * 2, long[WORK])
    assert parts(12, window=4, way="chunked")[WORK] <= long[WORK]


def test_the_node_counts_it_and_says_what_would_fit(plain):
    model = videos.causal(plain, window=8, sink=1)
    node = FrugalMemoryPlan.PREPARE_CLASS_CLONE({})
    latent = {"samples": torch.zeros(1, 16, 24, SIDE, SIDE)}
    weights = sum(value.nbytes for value in model.model.diffusion_model.parameters())

    def made(gb):
        out = node.execute(
            model=model, width=832, height=480, frames=81, batch_size=1, guidance=True,
            budget_gb=gb, latent=latent, frames_per_block=BLOCK,
        ).args  # fmt: skip
        return out[1], json.loads(out[2])

    text, data = made(1.0)
    page = 64 * 256 * 4 * 2
    found = data["phases"][0]["parts"]
    assert found[CAUSAL_KV] == 2 * 2 * 9 * page
    assert data["job"]["block"] == BLOCK and "in blocks of 2 latent frames" in text
    assert "9 latent frames in the attention window, for each of cond and uncond" in text
    assert not data["advice"]
    # One byte per value is enough, and so is main memory.
    tight = (weights + data["totals"][SAMPLE] - weights) / 1e9
    text, data = made(tight - found[CAUSAL_KV] / 2 / 1e9)
    assert any("kv_dtype 'int8'" in line for line in data["advice"]) or not data["streamed"]
    text, data = made(tight * 0.5)
    assert any(line.startswith("Causal Model") or "no setting" in line for line in data["advice"])


@pytest.mark.parametrize("first", [True, False], ids=["plan first", "plan last"])
def test_the_video_is_the_same(plain, first):
    """Wherever the plan is put, its pieces change no bit; causal self-attention stays whole."""
    memory_options = MemoryOptions(True, 2, 2)

    def planned(model):
        plan, peaks = memory_plan_run.plan_of(model, job_of(6, True), 0, block=BLOCK)
        object.__setattr__(plan, "memory_options", memory_options)
        return memory_plan_run.apply(model, plan, peaks, False, None)

    expected = run(videos.causal(plain, window=4), 6, 3.0)
    if first:
        model = videos.causal(planned(plain), window=4)
    else:
        model = planned(videos.causal(plain, window=4))
    calls = []

    def count(executor, x, *args, **kwargs):
        calls.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.count", count)
    made = run(model, 6, 3.0)
    assert set(calls) == {1}
    assert videos.far(made, expected) < 1e-5


def test_comfyui_is_told_of_the_block_and_the_pages(plain, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    model = videos.causal(plain, window=4)
    plan, peaks = memory_plan_run.plan_of(model, job_of(12, True), 0, block=BLOCK)
    parts = sampling(plan)
    model = memory_plan_run.apply(model, plan, peaks, False, None)
    run(model, 12, 3.0)
    assert asked[-1] == parts[WORK] + parts[CAUSAL_KV] + parts[LATENTS]
    # What the sampler says of the run counts more than what was planned.
    needs = memory_plan_run.causal_trace.Needs(1, 0, 2)
    model.model_options["transformer_options"][CAUSAL_NEEDS_KEY] = needs
    run(model, 12, 3.0)
    assert asked[-1] < parts[WORK] + parts[CAUSAL_KV] + parts[LATENTS]
    assert "memory_required" not in vars(plain.model)


@pytest.mark.parametrize("at", [1, 3, 4])
def test_out_of_memory_on_any_call_and_the_video_goes_on(plain, at):
    """The call that writes the cache, too, which must then not have been written twice."""
    expected = run(videos.causal(plain, window=4), 4, 3.0)
    model = videos.causal(plain, window=4)
    plan, peaks = memory_plan_run.plan_of(model, job_of(4, True), 0, block=BLOCK)
    model = memory_plan_run.apply(model, plan, peaks, False, None)
    seen = []

    def fail(executor, x, *args, **kwargs):
        result = executor(x, *args, **kwargs)
        seen.append(x.shape[0])
        if len(seen) == at:
            # All layers ran: what was written has to be taken back.
            raise comfy.model_management.OOM_EXCEPTION("injected: CUDA out of memory")
        return result

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.oom", fail)
    made = run(model, 4, 3.0)
    assert videos.far(made, expected) < 1e-5
    assert 2 in seen[:at] and set(seen[at:]) == {1}
    (wrapper,) = model.wrappers["outer_sample"][policy.KEY]
    assert len(wrapper.__self__.changes) == 1


def test_comfyuis_own_causal_class_needs_the_causal_node(tmp_path):
    pytest.importorskip("comfy.ldm.wan.ar_model")
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    native = videos.load(tmp_path, metadata=metadata)
    with pytest.raises(FrugalError, match=r"put Causal Model between"):
        memory_plan_run.plan_of(native, job_of(4, False), 0)
    model = videos.causal(native, window=4)
    plan, _ = memory_plan_run.plan_of(model, job_of(8, False), 0, block=BLOCK)
    assert sampling(plan)[CAUSAL_KV] == 2 * 4 * 64 * 256 * 4 * 2
