"""The plan on a MODEL: what it says, what ComfyUI does with it, and that nothing stays behind."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import pytest
import torch

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.kernels.memory import chunks, fit
from frugal.kernels.memory.plan import CROSS_KV, DECODE, SAMPLE, Job, MemoryOptions, latent_bytes
from frugal.nodes.memory import cross_kv_run, memory_plan_run, meta_models
from frugal.nodes.memory.memory_plan import FrugalMemoryPlan
from frugal.tests.helpers import rounding
from frugal.tests.helpers import sampling as bed
from frugal.tests.helpers.memory import allocator_peak

STEPS = 2
JOB = Job(64, 64, 5)


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 8)


def planned(model, memory_options: MemoryOptions):
    plan, peaks = memory_plan_run.plan_of(model, JOB, 0)
    object.__setattr__(plan, "memory_options", memory_options)
    return memory_plan_run.apply(model, plan, peaks, False, None)


def state_of(model) -> dict:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


@pytest.mark.numeric
@pytest.mark.parametrize(
    "memory_options", [MemoryOptions(True), MemoryOptions(True, 2), MemoryOptions(True, 4, 2)]
)
def test_the_video_is_the_same_and_the_model_too(wan, prompts, memory_options):
    plain, calls = bed.counted(wan)
    before, expected = state_of(wan), bed.sample(plain, prompts, STEPS)
    # ComfyUI joins the two conditions here, so separating them shows.
    assert calls == [2] * STEPS
    separate, calls = bed.counted(planned(wan, memory_options))
    out = bed.sample(separate, prompts, STEPS)
    assert calls == [1] * (2 * STEPS)
    one_by_one = bed.sample(planned(wan, MemoryOptions(True)), prompts, STEPS)
    limit = bed.rounding_of(wan, STEPS)
    assert rounding.distance(out, one_by_one) <= limit
    assert rounding.distance(out, expected) <= limit
    again = bed.sample(plain, prompts, STEPS)
    assert torch.equal(again, expected)
    assert "memory_required" not in vars(wan.model)
    plain.unpatch_model()
    after = wan.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_clone_without_the_plan_does_not_follow_it(wan, prompts):
    first = planned(wan, MemoryOptions(True, 4, 4))
    bed.sample(first, prompts, 1)
    plain, calls = bed.counted(wan)
    bed.sample(plain, prompts, 1)
    assert calls == [2]
    second, calls = bed.counted(planned(first, MemoryOptions(False, 2)))
    bed.sample(second, prompts, 1)
    assert calls == [2]
    keys = [name for name in second.object_patches if name.endswith("ffn.forward")]
    assert len(keys) == 2
    whole = second.object_patches[keys[0]].frugal_whole
    # A plan on a plan goes through ComfyUI's forward, not through the first plan's.
    assert not hasattr(whole, "frugal_whole")


def test_comfyui_is_told_the_traced_memory(wan, prompts, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **options):
        asked.append((memory_required, options["minimum_memory_required"]))
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    peaks = meta_models.ForwardPeaks(wan.model, torch.device("cpu"))
    for memory_options, rows in ((MemoryOptions(), 2), (MemoryOptions(True), 1)):
        bed.sample(planned(wan, memory_options), prompts, 1)
        shape = tuple(bed.latent_of().shape[2:])
        around = latent_bytes(1, shape)
        assert asked[-1] == (
            peaks.of(rows, shape, memory_options) + around,
            peaks.of(1, shape, memory_options) + around,
        )


def test_a_budget_holds_back_what_lies_beyond_it(wan, monkeypatch):
    plan, peaks = memory_plan_run.plan_of(wan, JOB, 1.0)
    clone = memory_plan_run.apply(wan, plan, peaks, True, None)
    (policy,) = (
        wrapper.__self__ for wrapper in clone.wrappers["outer_sample"]["frugal.memory_plan"]
    )
    card = torch.device("cuda", 0)
    loaded = SimpleNamespace(device=card, model_loaded_memory=lambda: 2 * 10**9)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 5 * 10**9)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [loaded])
    assert policy.withheld(SimpleNamespace(load_device=card)) == 6 * 10**9
    assert policy.withheld(clone) == 0


@pytest.mark.parametrize(
    "hurt", [KeyboardInterrupt, comfy.model_management.InterruptProcessingException]
)
def test_a_cancelled_run_leaves_nothing(wan, prompts, hurt):
    clone = planned(wan, MemoryOptions(True, 2))

    def stop(*_):
        raise hurt()

    with pytest.raises(hurt):
        bed.sample(clone, prompts, STEPS, callback=stop)
    assert "memory_required" not in vars(wan.model)
    (policy,) = (w.__self__ for w in clone.wrappers["outer_sample"]["frugal.memory_plan"])
    assert policy.state.now == policy.state.planned == MemoryOptions(True, 2)


def test_report_data_and_chart(wan, vae):
    node = FrugalMemoryPlan.PREPARE_CLASS_CLONE({})
    latent = {"samples": torch.zeros(1, 16, 3, 8, 12)}
    out = node.execute(
        model=wan, width=832, height=480, frames=81, batch_size=1, guidance=True,
        budget_gb=0.012, vae=vae, latent=latent,
    )  # fmt: skip
    _, text, data, chart = out.args
    found = json.loads(data)
    job = {"width": 96, "height": 64, "frames": 9, "batch": 1, "guided": True, "block": 0}
    assert found["job"] == job
    assert found["tokens"] == 3 * 4 * 6 and "96 x 64, 9 frames" in text
    weights = sum(found["formats"].values())
    assert weights == sum(value.nbytes for value in wan.model.diffusion_model.parameters())
    names = [phase["name"] for phase in found["phases"]]
    assert names == [SAMPLE, DECODE]
    assert chart.shape == (1, 560, 1024, 3) and 0 <= chart.min() < chart.max() <= 1
    # 12 MB is less than the weights.
    assert found["streamed"] > 0 and found["memory_options"]["sequential"]


@pytest.mark.numeric
def test_kept_text_is_counted_and_changes_no_bit(wan, prompts):
    kept, _ = cross_kv_run.apply(wan, cross_kv_run.Options(), lambda _: None)
    # Two prompts: what the layers are given, and two layers' keys and values of it, 512 tokens.
    assert memory_plan_run.weights_of(kept).caches == {CROSS_KV: 2 * (1 + 2 * 2) * 512 * 256 * 4}
    assert memory_plan_run.weights_of(wan).caches == {}
    memory_options = MemoryOptions(True, 2, 2)
    out = bed.sample(planned(kept, memory_options), prompts, STEPS)
    assert torch.equal(out, bed.sample(planned(wan, memory_options), prompts, STEPS))


def test_other_models_are_refused(wan, vae):
    class Other:
        load_device = torch.device("cpu")
        model = torch.nn.Module()

    Other.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(FrugalError, match=r"the MODEL is a Module \(Linear\); expected a Wan"):
        memory_plan_run.plan_of(Other, JOB, 0)
    with pytest.raises(FrugalError, match="4 dimensions"):
        memory_plan_run.job_of({"samples": torch.zeros(1, 4, 8, 8)}, 1, 1, 1, 1, True)


def test_a_decode_takes_what_is_predicted(vae):
    latent = (3, 12, 12)
    whole, stream, tiled, how = meta_models.decoded(vae, latent)
    assert how == "traced" and tiled == stream == whole
    model = vae.first_stage_model
    counted = allocator_peak(lambda: model.decode(torch.zeros(1, 16, *latent)))
    # Convolutions on a CPU pack their input; nothing else is missing.
    assert whole <= counted * 1.02
    held = next(model.parameters())
    assert held.device.type == "cpu" and not held.is_meta


def test_tiles_and_long_videos_follow_from_a_short_trace(vae, monkeypatch):
    monkeypatch.setattr(meta_models, "LONGEST", 5)
    whole, stream, tiled, _ = meta_models.decoded(vae, (9, 40, 64))
    light = meta_models.light_vae(vae.first_stage_model)

    def peak(*shape):
        return meta_models.decode_peak(light, 16, shape, torch.float32)

    assert tiled == whole * 32 * 32 // (40 * 64)
    assert peak(5, 32, 32) == pytest.approx(stream * 32 * 32 / (40 * 64), rel=1e-3)
    longer = peak(9, 40, 64)
    assert longer <= whole <= longer + 4 * 4 * 3 * 320 * 512 * 4


def test_the_plan_agrees_with_the_table_of_known_models():
    """The constants that the doctor uses are what a trace of the real size gives."""

    # 14B without memory, in 16 bits as on a card.
    config = dict(
        image_model="wan2.1", model_type="i2v", dim=5120, ffn_dim=13824, num_heads=40,
        num_layers=40, in_dim=36, out_dim=16,
    )  # fmt: skip
    model = SimpleNamespace(
        model_config=SimpleNamespace(unet_config=config),
        manual_cast_dtype=torch.bfloat16,
        diffusion_model=meta_models.comfy.ldm.wan.model.WanModel(
            **config, device="meta", operations=meta_models.comfy.ops.disable_weight_init
        ),
    )
    peak = meta_models.ForwardPeaks(model, torch.device("cpu")).of(
        1, (21, 60, 104), MemoryOptions()
    )
    assert peak == pytest.approx(fit.wan_work(5120, 832, 480, 81)[1], rel=0.01)
