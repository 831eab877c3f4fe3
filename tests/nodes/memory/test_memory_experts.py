"""The memory plan of two experts, and of a model that keeps the constant part of its context."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch

from frugal.kernels.memory import chunks, cross_kv_report
from frugal.kernels.memory.plan import CROSS_KV, SAMPLE, WEIGHTS, Job, MemoryOptions
from frugal.nodes.memory import cross_kv_run, main_memory_run, memory_plan_run, policy
from frugal.nodes.wan import experts_run, load_run, mapped
from frugal.tests.helpers import cross_kv as contexts
from frugal.tests.helpers import rounding
from frugal.tests.helpers import sampling as runs
from frugal.tests.helpers import wan as bed

pytestmark = pytest.mark.card

JOB, STEPS = Job(64, 64, 5), 4
SWITCHES = MemoryOptions(True, 2, 2)


def load(folder, name, seed, config=bed.T2V):
    path = bed.write(
        folder / f"{name}.safetensors", bed.base(bed.weights(config, seed), torch.float32)[0]
    )
    with torch.inference_mode():
        return load_run.load_wan(path, "fp32")[0]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory_experts")
    return load(folder, "high", 1), load(folder, "low", 2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 8)


def planned(model, memory_options=SWITCHES):
    plan, peaks = memory_plan_run.plan_of(model, JOB, 0)
    object.__setattr__(plan, "memory_options", memory_options)
    return memory_plan_run.apply(model, plan, peaks, False, None)


def join(high, low):
    return experts_run.join(high, low, 0.9, 0.0)[0]


def test_one_expert_is_on_the_device_at_a_time(experts, monkeypatch):
    plan, _ = memory_plan_run.plan_of(join(*experts), JOB, 0)
    alone, _ = memory_plan_run.plan_of(experts[0], JOB, 0)
    (phase,) = (each for each in plan.phases if each.name == SAMPLE)
    (expected,) = (each for each in alone.phases if each.name == SAMPLE)
    assert phase.parts == expected.parts
    # Buffers of the schedule are no weights.
    assert sum(plan.formats.values()) == pytest.approx(phase.parts[WEIGHTS], rel=1e-3)
    assert any("two experts, one at a time" in note for note in plan.notes)
    # The larger one counts, whichever it is.
    whole = experts[0].model_size()
    for larger in experts:
        monkeypatch.setattr(
            memory_plan_run,
            "weights_of",
            lambda model, guided, larger=larger: memory_plan_run.Weights(
                2 * whole if model.model is larger.model else whole, {}, 0
            ),
        )
        plan, _ = memory_plan_run.plan_of(join(*experts), JOB, 0)
        assert plan.phases[0].parts[WEIGHTS] == 2 * whole


def test_both_experts_work_as_planned(experts, prompts):
    """On the pair, and on each before they are joined: the same video as without."""
    expected = runs.sample(join(*experts), prompts, STEPS)
    limit = runs.rounding_of(experts[0], STEPS)
    for model in (planned(join(*experts)), join(*(planned(each) for each in experts))):
        assert model.wrappers["outer_sample"][experts_run.KEY][0].low is not experts[1]
        out = runs.sample(model, prompts, STEPS)
        assert rounding.distance(out, expected) <= limit
        assert all("memory_required" not in vars(each.model) for each in experts)
    one_by_one = runs.sample(planned(join(*experts), MemoryOptions(True)), prompts, STEPS)
    again = runs.sample(planned(join(*experts)), prompts, STEPS)
    assert rounding.distance(again, one_by_one) <= limit


def test_pieces_are_at_work_in_both_experts(experts, prompts):
    hooks, counts = [], []
    for each in experts:
        seen = []
        counts.append(seen)
        first = each.model.diffusion_model.blocks[0].ffn[0]
        hooks.append(
            first.register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(tuple(given[0].shape[:2]))
            )
        )
    try:
        runs.sample(planned(join(*experts)), prompts, STEPS)
    finally:
        for hook in hooks:
            hook.remove()
    # 32 tokens of one condition, in two pieces.
    assert all(set(seen) == {(1, 16)} for seen in counts)
    assert sum(map(len, counts)) == STEPS * 2 * 2


def test_memory_that_runs_out_in_either_expert_is_told(experts, prompts):
    failed = []

    def once(name):
        def wrapper(executor, x, *args, **kwargs):
            if name not in failed:
                failed.append(name)
                raise comfy.model_management.OOM_EXCEPTION("injected: CUDA out of memory")
            return executor(x, *args, **kwargs)

        return wrapper

    pair = []
    for each, name in zip(experts, ("high", "low"), strict=True):
        pair.append(each.clone())
        pair[-1].add_wrapper_with_key("apply_model", "test.oom", once(name))
    model = planned(join(*pair), MemoryOptions())
    out = runs.sample(model, prompts, STEPS)
    assert failed == ["high", "low"]
    assert len(model.get_attachment(memory_plan_run.PLAN_KEY).changes) == 2
    expected = runs.sample(join(*experts), prompts, STEPS)
    assert rounding.distance(out, expected) <= runs.rounding_of(experts[0], STEPS)
    # The next run tells of itself only.
    runs.sample(model, prompts, STEPS)
    assert not model.get_attachment(memory_plan_run.PLAN_KEY).changes


def test_what_is_put_on_the_pair_reaches_both_in_spite_of_the_plan(experts, prompts):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    def shifted(model):
        return ModelSamplingSD3().patch(model, 8.0)[0]

    expected = runs.sample(join(*map(shifted, experts)), prompts, STEPS)
    for model in (planned(shifted(join(*experts))), shifted(planned(join(*experts)))):
        out = runs.sample(model, prompts, STEPS)
        assert rounding.distance(out, expected) <= runs.rounding_of(experts[0], STEPS)
    with pytest.raises(memory_plan_run.FrugalError, match="was put on the joined model"):
        clone = planned(join(*experts))
        clone.add_wrapper_with_key("apply_model", "other", lambda executor, *a: executor(*a))
        runs.sample(clone, prompts, STEPS)


def test_the_other_expert_makes_room_within_a_budget(experts, monkeypatch):
    plan, peaks = memory_plan_run.plan_of(join(*experts), JOB, 1.0)
    clone = memory_plan_run.apply(join(*experts), plan, peaks, True, None)
    (wrapper,) = clone.wrappers["outer_sample"][policy.KEY]
    card = torch.device("cuda", 0)
    other = SimpleNamespace(device=card, model_loaded_memory=lambda: 3 * 10**9)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 5 * 10**9)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [other])
    # 8 GB could be had, 1 GB may be used.
    assert wrapper.__self__.withheld(SimpleNamespace(load_device=card)) == 7 * 10**9


@pytest.mark.parametrize("fp8", [False, True], ids=["exact", "fp8"])
@pytest.mark.parametrize("config", [bed.T2V, bed.I2V, bed.VACE], ids=["T2V", "I2V", "VACE"])
def test_kept_context_is_what_a_run_keeps(config, fp8, tmp_path, monkeypatch):
    monkeypatch.setattr(cross_kv_report, "TEXT_TOKENS", contexts.ROWS)
    model = load(tmp_path, "wan", 3, config)
    reports = []
    kept, found = cross_kv_run.apply(model, cross_kv_run.Options(fp8), reports.append)
    given = [
        [[contexts.text(seed, contexts.ROWS), contexts.image() if config.image else {}]]
        for seed in (5, 6)
    ]
    for cfg, guided in ((3.0, True), (1.0, False)):
        planned_bytes = memory_plan_run.weights_of(kept, guided).caches[CROSS_KV]
        with torch.inference_mode():
            contexts.sample(kept, given, cfg=cfg)
        # An image beside both prompts is kept once where the matrix kernel rounds it alike there.
        image = cross_kv_report.IMAGE_TOKENS * found.image_row_bytes if guided else 0
        assert any(
            planned_bytes + more == pytest.approx(reports[-1].bytes, rel=0.01)
            for more in (0, image)
        )
    plan, _ = memory_plan_run.plan_of(kept, JOB, 0)
    assert plan.phases[0].parts[CROSS_KV] == memory_plan_run.weights_of(kept, True).caches[CROSS_KV]
    assert any("read in the first steps only" in note for note in plan.notes)
    assert found.weight_bytes > 0
    assert memory_plan_run.weights_of(model).caches == {}
    clone = kept.clone()
    clone.remove_wrappers_with_key("sampler_sample", cross_kv_run.KEY)
    assert memory_plan_run.weights_of(clone).caches == {}


@pytest.mark.skipif(not main_memory_run.MAPS.exists(), reason="Linux lists mapped files")
@pytest.mark.skipif(mapped.dynamic(), reason="ComfyUI's own mapping")
def test_main_memory_tells_mapped_weights_from_copied_ones(tmp_path, monkeypatch):
    """fp32 weights stay in their files at fp32 and are copied to bf16."""
    tensors = bed.base(bed.weights(), torch.float32)[0]
    paths = [bed.write(tmp_path / f"{name}.safetensors", tensors) for name in ("high", "low")]
    tensors = bed.base(bed.weights(seed=2), torch.float32)[0]
    bed.write(paths[1], tensors)
    plans = {}
    for dtype in ("fp32", "bf16"):
        with torch.inference_mode():
            pair = [load_run.load_wan(path, dtype)[0] for path in paths]
        plans[dtype] = memory_plan_run.plan_of(join(*pair), JOB, 0)[0].main_memory
    size = paths[0].stat().st_size
    for dtype, memory in plans.items():
        assert [each.name for each in memory.stages] == [
            "high noise expert", "low noise expert", "after the run",
        ]  # fmt: skip
        stage = memory.stages[0]
        assert stage.copied + stage.mapped == pytest.approx(
            2 * size * (1 if dtype == "fp32" else 0.5), rel=0.02
        )
        assert (stage.mapped > 0.9 * 2 * size) == (dtype == "fp32")
    text = memory_plan_run.plan_of(join(*pair), JOB, 0)[0].text()
    assert "main memory, " in text and "after the run" in text
    # A device of its own, without dynamic VRAM: what ran there comes back as a copy.
    for each in pair:
        each.load_device = torch.device("meta")
    held = main_memory_run.of(join(*pair))
    assert held is not None
    assert held.stages[-1].copied == pytest.approx(size, rel=0.02)


def test_without_a_list_of_mapped_files_nothing_is_said(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(main_memory_run, "MAPS", tmp_path / "absent")
    plan = memory_plan_run.plan_of(join(*experts), JOB, 0)[0]
    assert plan.main_memory is None and "main memory, " not in plan.text()
