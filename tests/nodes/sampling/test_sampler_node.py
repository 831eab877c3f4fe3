"""The sampler node: ComfyUI's KSampler to the bit while off, and what its presets do."""

from __future__ import annotations

import itertools
import json

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

import nodes as stock
from frugal.kernels.errors import FrugalError
from frugal.kernels.memory.plan import Job, MemoryOptions
from frugal.kernels.sampling.presets import PRESETS
from frugal.nodes import _services
from frugal.nodes.memory import memory_plan_run, meta_models
from frugal.nodes.memory import nodes as plan_family
from frugal.nodes.sampling import attention_run, guidance_range_run, sampler_run, step_cache_run
from frugal.nodes.sampling.guidance_range import FrugalGuidanceRange
from frugal.nodes.sampling.preview import AS_SET, MIDDLE_FRAME
from frugal.nodes.sampling.sampler import FrugalSampler
from frugal.nodes.wan import experts_run, load_run
from frugal.tests.helpers import flows
from frugal.tests.helpers import sampling as sampling_bed
from frugal.tests.helpers import wan as wan_bed

assert plan_family.NODES  # the family that offers memory plans, loaded as ComfyUI loads it
STEPS, CFG = 16, sampling_bed.CFG
NO_CACHE = step_cache_run.Options(0.0)


def ours(model, prompts, preset="off", steps=STEPS, sampler="euler", cfg=CFG, **more):
    """Outputs of the node: latent dict, text, numbers."""
    latent = more.pop("latent", {"samples": sampling_bed.latent_of()})
    node = FrugalSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        result = node.execute(
            model, *prompts, latent, preset, 7, steps, cfg, sampler, "simple",
            more.pop("denoise", 1.0), more.pop("preview", AS_SET), **more,
        ).args  # fmt: skip
    return result[0], result[1], json.loads(result[2])


def theirs(model, prompts, steps=STEPS, sampler="euler", cfg=CFG, latent=None, denoise=1.0):
    latent = {"samples": sampling_bed.latent_of()} if latent is None else latent
    with torch.inference_mode():
        return stock.KSampler().sample(
            model, 7, steps, cfg, sampler, "simple", *prompts, latent, denoise
        )[0]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc"])
def test_off_is_the_ksampler_to_the_bit(wan, prompts, sampler):
    mine, text, data = ours(wan, prompts, steps=3, sampler=sampler)
    stock_latent = theirs(wan, prompts, steps=3, sampler=sampler)
    assert torch.equal(mine["samples"], stock_latent["samples"])
    assert mine.keys() == stock_latent.keys()
    assert (data["step_cache"], data["notes"], data["attention"]) == ([], [], None)
    assert text.startswith("3 steps, ") and f"\n{sampler}, simple, cfg 3" in text


def test_off_with_mask_batch_and_denoise(smooth_wan, prompts):
    make = torch.Generator().manual_seed(3)
    latent = {
        "samples": torch.randn(2, 16, 2, 8, 8, generator=make),
        "noise_mask": torch.rand(2, 1, 2, 8, 8, generator=make).round(),
        "batch_index": [4, 9],
    }
    mine, _, _ = ours(smooth_wan, prompts, steps=4, latent=latent, denoise=0.6)
    want = theirs(smooth_wan, prompts, steps=4, latent=latent, denoise=0.6)
    assert torch.equal(mine["samples"], want["samples"])
    assert mine["batch_index"] == [4, 9]


@pytest.mark.parametrize("preset", ["quality", "balanced", "draft"])
def test_presets_save_network_calls_and_stay_near(smooth_wan, prompts, preset):
    full = theirs(smooth_wan, prompts, steps=40)["samples"]
    counting, calls = sampling_bed.counted(smooth_wan)
    mine, text, data = ours(counting, prompts, preset, steps=40)
    (cache,) = data["step_cache"]
    assert cache["computed"] + cache["skipped"] == 40
    assert cache["skipped"] > 5
    assert cache["computed"] <= sum(calls) <= 2 * cache["computed"]
    guided = PRESETS[preset].guidance_end == 1
    assert guided == (sum(calls) == 2 * cache["computed"])
    assert flows.relative(mine["samples"], full) < (0.02 if guided else 0.3)
    assert f"{cache['computed']} of 40 model calls" in text
    assert data["attention"] is not None


def test_a_stronger_preset_makes_fewer_calls(smooth_wan, prompts):
    made = []
    for preset in ("off", "quality", "balanced", "draft"):
        counting, calls = sampling_bed.counted(smooth_wan)
        ours(counting, prompts, preset, steps=40)
        made.append(sum(calls))
    assert made[0] == 80
    assert made == sorted(set(made), reverse=True)


def test_distilled_leaves_the_negative_prompt_out_and_says_so(smooth_wan, prompts):
    counting, calls = sampling_bed.counted(smooth_wan)
    mine, _, data = ours(counting, prompts, "distilled", steps=4, cfg=6.0)
    assert calls == [1] * 4
    assert torch.equal(mine["samples"], theirs(smooth_wan, prompts, steps=4, cfg=1.0)["samples"])
    assert (data["cfg"], data["step_cache"]) == (1.0, [])
    assert data["notes"][0] == "cfg 6 became 1: the preset is for distilled models"
    _, _, data = ours(smooth_wan, prompts, "distilled", steps=20, cfg=1.0)
    assert "20 steps" in data["notes"][0]


def test_a_step_cache_that_is_set_by_hand_stays(smooth_wan, prompts):
    reports = []
    model = step_cache_run.apply(smooth_wan, NO_CACHE, reports.append)
    _, _, data = ours(model, prompts, "draft")
    assert (data["step_cache"], reports[0].skipped) == ([reports[0].data()], 0)
    assert any("stays as it was set" in note for note in data["notes"])


def test_a_guidance_range_that_is_set_by_hand_stays(smooth_wan, prompts):
    counting, calls = sampling_bed.counted(guidance_range_run.apply(smooth_wan, 0.0, 0.3))
    _, _, data = ours(step_cache_run.apply(counting, NO_CACHE, lambda _: None), prompts, "draft")
    alone = calls.copy()
    calls.clear()
    theirs(counting, prompts)
    assert alone == calls and sum(calls) < 2 * len(calls)
    assert "the guidance range that is on the model stays as it was set there" in data["notes"]


def test_the_model_that_came_in_is_left_as_it_was(smooth_wan, prompts):
    before = str(smooth_wan.model_options), str(smooth_wan.wrappers), dict(smooth_wan.attachments)
    ours(smooth_wan, prompts, "draft", preview=MIDDLE_FRAME)
    assert (
        str(smooth_wan.model_options),
        str(smooth_wan.wrappers),
        dict(smooth_wan.attachments),
    ) == before


def test_preview_shows_the_middle_frame_and_changes_nothing(smooth_wan, prompts, monkeypatch):
    shown = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: shown.append((value, total, preview)),
    )
    latent = {"samples": sampling_bed.latent_of(5)}
    mine, _, _ = ours(smooth_wan, prompts, steps=4, latent=latent, preview=MIDDLE_FRAME)
    pictures = [(value, total, preview[1]) for value, total, preview in shown if preview]
    assert [(value, total) for value, total, _ in pictures] == [(i, 4) for i in range(1, 5)]
    assert pictures[0][2].size == (8, 8)
    form = smooth_wan.model.latent_format
    frame = form.process_in(mine["samples"])[0, :, 2]
    colours = torch.einsum("chw,ck->hwk", frame, torch.tensor(form.latent_rgb_factors))
    colours += torch.tensor(form.latent_rgb_factors_bias)
    want = ((colours + 1) / 2).clamp(0, 1) * 255
    got = torch.tensor(list(pictures[-1][2].getdata())).reshape(8, 8, 3)
    assert float((got - want).abs().max()) <= 1.5
    without = theirs(smooth_wan, prompts, steps=4, latent=latent)
    assert torch.equal(mine["samples"], without["samples"])


@pytest.mark.parametrize("span", [(0.0, 0.5), (0.3, 1.0), (0.2, 0.6)])
def test_guidance_range_is_two_cfgs_by_hand(smooth_wan, prompts, span):
    """Euler by hand over the model's own estimates, cfg by noise level."""
    sampling = smooth_wan.get_model_object("model_sampling")
    high, low = (sampling.percent_to_sigma(share) for share in span)
    node = FrugalGuidanceRange.execute(smooth_wan, *span).args[0]
    counting, calls = sampling_bed.counted(node)
    mine = sampling_bed.sample(counting, prompts, STEPS)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    x = sigmas[0] * comfy.sample.prepare_noise(sampling_bed.latent_of(), sampling_bed.SEED)
    guided = 0
    for now, after in itertools.pairwise(sigmas):
        inside = bool(low <= now <= high)
        guided += inside
        estimates = [
            sampling_bed.exact_velocity(x, 1000 * now.reshape(1), prompt[0][0])
            for prompt in prompts
        ]
        slope = estimates[0] + (CFG - 1) * inside * (estimates[0] - estimates[1])
        x = x + (after - now) * slope
    assert 0 < guided < STEPS
    assert sum(calls) == STEPS + guided
    x = smooth_wan.model.latent_format.process_out(x)
    assert flows.relative(mine, x) < 1e-3


def test_guidance_range_refuses_what_it_cannot_do(smooth_wan, prompts):
    with pytest.raises(FrugalError, match=r"start 0\.8 and end 0\.2"):
        guidance_range_run.apply(smooth_wan, 0.8, 0.2)
    model = guidance_range_run.apply(smooth_wan, 0.0, 0.5)
    guider = Guider_DualCFG(model)
    guider.set_conds(prompts[0], prompts[1], prompts[1])
    guider.set_cfg(3.0, 2.0)
    latent = sampling_bed.latent_of()
    sampling = smooth_wan.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 6)
    with torch.inference_mode(), pytest.raises(FrugalError, match="Guider_DualCFG"):
        guider.sample(
            comfy.sample.prepare_noise(latent, 1), latent,
            comfy.samplers.sampler_object("euler"), sigmas, seed=1,
        )  # fmt: skip


def test_every_preset_is_in_the_nodes_list():
    combo = next(i for i in FrugalSampler.define_schema().inputs if i.id == "preset")
    assert list(combo.options) == list(PRESETS)
    assert sampler_run.PRESETS is PRESETS


@pytest.mark.parametrize("preset", ["quality", "distilled"])
def test_presets_plan_the_memory_and_say_what_it_took(wan, prompts, preset):
    latent = {"samples": sampling_bed.latent_of(3)}
    _, text, data = ours(wan, prompts, preset, steps=2, cfg=1.0, latent=latent)
    found = data["memory"]
    plan, _ = memory_plan_run.plan_of(wan, Job(64, 64, 9, 1, False), 0)
    assert found["predicted"] == plan.phases[0].total > wan.model_size()
    assert found["measured"] is None and found["fits"] and not found["changes"]
    assert "memory while sampling" in text and "memory options: none" in text
    assert not [note for note in data["notes"] if "plan" in note]


def test_a_plan_of_the_node_stays_and_its_pieces_are_reported(wan, prompts):
    plan, peaks = memory_plan_run.plan_of(wan, Job(64, 64, 5), 0)
    object.__setattr__(plan, "memory_options", MemoryOptions(True, 2))
    model = memory_plan_run.apply(wan, plan, peaks, False, None)
    # Even with the preset off, since the plan is at work.
    mine, text, data = ours(model, prompts, steps=2)
    assert "cond and uncond run sequentially, feed-forward and cross-attention in 2 chunks" in text
    assert torch.equal(mine["samples"], theirs(model, prompts, steps=2)["samples"])
    assert data["notes"] == []
    _, _, data = ours(model, prompts, "distilled", steps=2, cfg=1.0)
    assert data["notes"][-1] == "the memory plan that is on the model stays as it was made there"
    assert "2 chunks" in data["memory"]["memory_options"]


def test_off_makes_no_plan_and_what_cannot_be_planned_is_said(wan, prompts, monkeypatch):
    _, text, data = ours(wan, prompts, steps=1)
    assert data["memory"] is None and "memory" not in text
    monkeypatch.setattr(meta_models, "KNOWN", ())
    _, _, data = ours(wan, prompts, "distilled", steps=1, cfg=1.0)
    assert data["memory"] is None
    assert data["notes"][-1] == "no memory plan: the MODEL is a WAN21 (WanModel)"
    monkeypatch.setattr(_services, "_OFFERS", {})
    _, _, data = ours(wan, prompts, "distilled", steps=1, cfg=1.0)
    assert data["notes"][-1] == "no memory plan: the plan nodes are not loaded"


def test_memory_that_ran_out_is_in_the_report(wan, prompts):
    failed = []

    def once(executor, x, *args, **kwargs):
        if not failed:
            failed.append(x.shape)
            raise comfy.model_management.OOM_EXCEPTION("injected: CUDA out of memory")
        return executor(x, *args, **kwargs)

    model = wan.clone()
    model.add_wrapper_with_key("apply_model", "test.oom", once)
    _, text, data = ours(model, prompts, "quality", steps=2)
    assert failed and len(data["memory"]["changes"]) == 1
    assert "out of memory: retrying this step" in text


def with_shift(model, shift):
    return ModelSamplingSD3().patch(model, shift)[0]


def with_lora(model):
    lora, _ = wan_bed.lora_of(wan_bed.weights())
    return comfy.sd.load_lora_for_models(model, None, lora, 0.01, 0.0)[0]


@pytest.mark.parametrize("steps", [4, 8])
def test_distilled_knows_the_noise_levels_it_needs(wan, prompts, steps):
    def notes(model, **more):
        return ours(model, prompts, "distilled", steps=steps, cfg=1.0, **more)[2]["notes"]

    model = with_lora(wan)
    assert notes(with_shift(model, 5.0)) == []
    (wrong,) = notes(with_shift(model, 8.0))
    assert wrong.startswith("timesteps 1000, 9") and "shift 5" in wrong
    assert notes(with_shift(model, 8.0), denoise=0.5) == []
    (bare,) = notes(with_shift(wan, 5.0))
    assert bare.startswith("no LoRA on the model: ")


def test_distilled_looks_at_both_experts(wan, prompts, tmp_path):
    low = load_run.load_wan(wan_bed.write(tmp_path / "low.safetensors", wan_bed.weights(seed=2)))[0]
    high = with_shift(with_lora(wan), 5.0)
    joined = experts_run.join(high, with_shift(low, 5.0), 0.875, 3.5)[0]
    notes = ours(joined, prompts, "distilled", steps=4, cfg=1.0)[2]["notes"]
    assert notes[0].startswith("the low noise expert runs at cfg 3.5")
    assert notes[1].startswith("no LoRA on the low noise expert: ")
    bare = with_shift(low, 5.0)
    joined = experts_run.join(high, with_lora(bare), 0.875, 0.0)[0]
    assert ours(joined, prompts, "distilled", steps=4, cfg=1.0)[2]["notes"] == []
    later = with_lora(experts_run.join(with_shift(wan, 5.0), bare, 0.875, 0.0)[0])
    assert ours(later, prompts, "distilled", steps=4, cfg=1.0)[2]["notes"] == []


def advanced(model, prompts, steps, cfg, span, latent):
    """KSampler (Advanced) for the steps of `span`, noise added before the first step only."""
    start, end = span
    with torch.inference_mode():
        return stock.KSamplerAdvanced().sample(
            attention_run.apply(model), "disable" if start else "enable", 7, steps, cfg, "euler",
            "simple", *prompts, latent, start, end, "disable" if end == steps else "enable",
        )[0]  # fmt: skip


@pytest.mark.parametrize("first_steps", [1, 2])
def test_first_phase_is_samplers_by_hand(wan, prompts, tmp_path, first_steps):
    low = load_run.load_wan(wan_bed.write(tmp_path / "low.safetensors", wan_bed.weights(seed=2)))[0]
    bare, low = with_shift(wan, 5.0), with_lora(with_shift(low, 5.0))
    high, steps = with_lora(bare), 4
    got, text, data = ours(
        experts_run.join(high, low, 0.9, 0.0)[0], prompts, "distilled", steps=steps, cfg=3.5,
        first_model=bare, first_steps=first_steps,
    )  # fmt: skip
    latent = {"samples": sampling_bed.latent_of()}
    # Of 1000, 937.5, 833.3 and 625, two steps are the high noise expert's.
    spans = [(bare, 3.5, (0, first_steps)), (high, 1.0, (first_steps, 2)), (low, 1.0, (2, steps))]
    for model, cfg, span in spans:
        if span[0] < span[1]:
            latent = advanced(model, prompts, steps, cfg, span, latent)
    assert torch.equal(got["samples"], latent["samples"])
    note = f"first phase: {first_steps} of 4 steps with first_model at cfg 3.5"
    assert note in data["notes"] and note in text
    # Guards: the phase, its guidance and its missing LoRA all matter.
    joined = experts_run.join(high, low, 0.9, 0.0)[0]
    for more in ({}, {"first_model": bare, "cfg": 1.0}, {"first_model": with_lora(high)}):
        other = ours(joined, prompts, "distilled", **({"steps": steps, "cfg": 3.5} | more))[0]
        assert not torch.equal(other["samples"], got["samples"])


def test_first_phase_that_cannot_be(wan, prompts):
    model = with_lora(wan)
    _, _, data = ours(model, prompts, "quality", steps=1, first_model=wan)
    assert "first_model is not used: it belongs to the preset distilled" in data["notes"]
    for first, steps, words in (
        (wan, 4, "lower first_steps.*4 of 4"),
        (model, 1, "goes into the LoRA loader.*the same as model"),
    ):
        with pytest.raises(FrugalError, match=words):
            ours(
                model, prompts, "distilled", steps=4, cfg=3.5, first_model=first, first_steps=steps
            )
    notes = ours(model, prompts, "distilled", steps=4, cfg=1.0, first_model=wan)[2]["notes"]
    assert any("cfg 1: guidance comes from a cfg above 1" in note for note in notes)


def test_a_schedule_that_comes_later_moves_the_guidance_range(smooth_wan, prompts):
    """The range is a part of the schedule in use, not of the one that the node saw."""
    made = []
    for order in (True, False):
        model = smooth_wan
        if order:
            model = ModelSamplingSD3().patch(model, 1.0)[0]
        model = guidance_range_run.apply(model, 0.0, 0.5)
        if not order:
            model = ModelSamplingSD3().patch(model, 1.0)[0]
        counting, calls = sampling_bed.counted(model)
        ours(counting, prompts, steps=10)
        made.append(calls)
    assert made[0] == made[1] and made[0].count(2) in (5, 6)
