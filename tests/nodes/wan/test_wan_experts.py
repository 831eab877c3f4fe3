"""Two Wan experts as one MODEL equal two samplers by hand, bit for bit."""

from __future__ import annotations

import re
import uuid

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.wan import experts_run, load_run
from frugal.nodes.wan.experts import FrugalWanTwoExperts
from frugal.tests.helpers import wan as bed

pytestmark = pytest.mark.card

STEPS, CFG, SEED = 5, 3.0, 11
SAMPLERS = ["euler", "uni_pc", "res_multistep", "dpmpp_2m", "heun"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    made = []
    for seed, name in ((1, "high"), (2, "low")):
        path = folder / f"wan_{name}_noise.safetensors"
        bed.write(path, bed.base(bed.weights(seed=seed), torch.float32)[0])
        with torch.inference_mode():
            made.append(load_run.load_wan(path, "fp32")[0])
    return made


@pytest.fixture(scope="module")
def prompts():
    make = torch.Generator().manual_seed(5)
    return [[[torch.randn(1, 12, 4096, generator=make), {}]] for _ in range(2)]


def shifted(model, shift: float):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def sigmas_of(model, steps=STEPS):
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)


def sample(model, sigmas, prompts, sampler="euler", latent=None, seed=SEED, cfg=CFG, **more):
    start = torch.zeros(1, 16, 2, 8, 8) if latent is None else latent
    noise = comfy.sample.prepare_noise(start, seed) if latent is None else torch.zeros_like(start)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, comfy.samplers.sampler_object(sampler), sigmas, *prompts, start,
            seed=seed, disable_pbar=True, **more,
        )  # fmt: skip


def by_hand(high, low, prompts, count, sampler="euler", cfg_low=CFG, steps=STEPS):
    sigmas = sigmas_of(high, steps)
    first = sample(high, sigmas[: count + 1], prompts, sampler)
    return sample(low, sigmas[count:], prompts, sampler, first, SEED + 1, cfg_low)


def join(high, low, boundary=0.875, cfg_low=0.0):
    return experts_run.join(high, low, boundary, cfg_low)[0]


def relative(one, other):
    return bed.relative(one, other)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_two_samplers_by_hand(experts, prompts, sampler):
    high, low = (shifted(model, 8.0) for model in experts)
    sigmas = sigmas_of(high)
    count = experts_run.high_steps(sigmas, 0.875)
    assert 1 < count < STEPS - 1
    ours = sample(join(high, low), sigmas, prompts, sampler)
    assert torch.equal(ours, by_hand(high, low, prompts, count, sampler))
    # Guards: either expert alone, and the switch at another step, are another picture.
    for other in (
        sample(high, sigmas, prompts, sampler),
        sample(low, sigmas, prompts, sampler),
        by_hand(high, low, prompts, count - 1, sampler),
        by_hand(low, high, prompts, count, sampler),
    ):
        assert relative(ours, other) > 1e-3


def test_start_image_reaches_both_experts(prompts, tmp_path):
    """Wan 2.2 image to video: 36 input channels, no image embedding."""
    pair = []
    for seed in (3, 4):
        tensors = bed.base(bed.weights(bed.variant(bed.T2V, in_dim=36), seed), torch.float32)[0]
        path = bed.write(tmp_path / f"{seed}.safetensors", tensors)
        with torch.inference_mode():
            pair.append(shifted(load_run.load_wan(path, "fp32")[0], 5.0))
    make = torch.Generator().manual_seed(6)
    mask = torch.ones(1, 1, 2, 8, 8)
    mask[:, :, 0] = 0
    start = {"concat_latent_image": torch.randn(1, 16, 2, 8, 8, generator=make)}
    given = [[[cross, start | {"concat_mask": mask}]] for [[cross, _]] in prompts]
    sigmas = sigmas_of(pair[0])
    count = experts_run.high_steps(sigmas, 0.9)
    ours = sample(join(*pair, 0.9), sigmas, given)
    assert torch.equal(ours, by_hand(*pair, given, count))
    assert 0 < count < STEPS and relative(ours, sample(join(*pair, 0.9), sigmas, prompts)) > 1e-3


def test_one_switched_run_is_one_run_up_to_rounding(experts, prompts):
    """euler keeps no history: with one expert on both sides the split changes rounding only."""
    high, other = experts[0], experts[0].clone()
    other.add_patches({"diffusion_model.head.head.bias": ("diff", (torch.zeros(64),))})
    sigmas = sigmas_of(shifted(high, 8.0))
    model = join(shifted(high, 8.0), shifted(other, 8.0))
    assert relative(sample(model, sigmas, prompts), sample(high, sigmas, prompts)) < 1e-5


def test_a_run_on_one_side_is_that_expert_alone(experts, prompts):
    high, low = experts
    whole = sigmas_of(high)
    for boundary, part, alone in (
        (0.0, whole, high),
        (0.5, whole[:3], high),
        (0.9, whole[3:], low),
    ):
        out = sample(join(high, low, boundary), part, prompts)
        assert torch.equal(out, sample(alone, part, prompts))
        assert not torch.equal(out, sample(low if alone is high else high, part, prompts))


def lora(model, seed: int, strength: float):
    make = torch.Generator().manual_seed(seed)
    patches = {
        f"diffusion_model.blocks.{block}.self_attn.q.weight": (
            "diff", (torch.randn(256, 256, generator=make) / 16,),
        )
        for block in range(2)
    }  # fmt: skip
    model = model.clone()
    assert len(model.add_patches(patches, strength)) == 2
    return model


def test_lora_before_belongs_to_one_and_lora_after_to_both(experts, prompts):
    high, low = (shifted(model, 8.0) for model in experts)
    sigmas = sigmas_of(high)
    count = experts_run.high_steps(sigmas, 0.875)
    plain = sample(join(high, low), sigmas, prompts)
    before = sample(join(lora(high, 1, 0.5), lora(low, 2, 0.8)), sigmas, prompts)
    assert torch.equal(before, by_hand(lora(high, 1, 0.5), lora(low, 2, 0.8), prompts, count))
    model = lora(join(lora(high, 1, 0.5), low), 3, 0.7)
    after = sample(model, sigmas, prompts)
    both = by_hand(lora(lora(high, 1, 0.5), 3, 0.7), lora(low, 3, 0.7), prompts, count)
    assert torch.equal(after, both)
    assert torch.equal(sample(model, sigmas, prompts), after)
    assert min(relative(before, plain), relative(after, plain), relative(after, before)) > 1e-3
    # The experts and the joined model are as they were.
    assert torch.equal(sample(join(high, low), sigmas, prompts), plain)


def test_the_same_lora_gives_the_same_mark(experts):
    """ComfyUI reloads the weights of a model whose mark has changed."""
    high, low = experts
    model = lora(join(high, low), 3, 0.7)
    switch = ours(model)
    marks = [switch._low_guider(guider(run)).model_patcher.patches_uuid for run in (model,) * 2]
    other = switch._low_guider(guider(lora(model, 4, 0.7))).model_patcher.patches_uuid
    assert marks[0] == marks[1] != other and isinstance(other, uuid.UUID)
    assert switch._low_guider(guider(join(high, low))).model_patcher.patches_uuid == (
        low.patches_uuid
    )


def ours(model):
    [switch] = model.wrappers["outer_sample"][experts_run.KEY]
    return switch


def guider(model):
    made = comfy.samplers.CFGGuider(model)
    made.set_conds([[torch.zeros(1, 2, 4096), {}]], [[torch.zeros(1, 2, 4096), {}]])
    return made


def test_shift_and_cfg_function_after_reach_both(experts, prompts):
    high, low = experts
    model = shifted(join(high, low), 8.0)
    sigmas = sigmas_of(model)
    expected = by_hand(
        shifted(high, 8.0), shifted(low, 8.0), prompts, experts_run.high_steps(sigmas, 0.875)
    )
    assert torch.equal(sample(model, sigmas, prompts), expected)
    calls = []

    def guidance(arguments):
        calls.append(float(arguments["sigma"].flatten()[0]))
        return arguments["uncond"] + CFG * (arguments["cond"] - arguments["uncond"])

    model = model.clone()
    model.set_model_sampler_cfg_function(guidance)
    close = sample(model, sigmas, prompts)
    assert len(calls) == STEPS and min(calls) < 0.875 < max(calls)
    assert relative(close, expected) < 1e-4


def test_cfg_of_the_low_noise_steps(experts, prompts):
    high, low = (shifted(model, 8.0) for model in experts)
    sigmas = sigmas_of(high)
    count = experts_run.high_steps(sigmas, 0.875)
    out = sample(join(high, low, cfg_low=1.5), sigmas, prompts)
    assert torch.equal(out, by_hand(high, low, prompts, count, cfg_low=1.5))
    assert relative(out, by_hand(high, low, prompts, count)) > 1e-3


def test_progress_counts_through_and_a_cancel_leaves_all_usable(experts, prompts):
    high, low = (shifted(model, 8.0) for model in experts)
    model, sigmas, seen = join(high, low), sigmas_of(high), []

    def follow(step, x0, x, total):
        seen.append((step, total))

    out = sample(model, sigmas, prompts, callback=follow)
    assert seen == [(step, STEPS) for step in range(STEPS)]

    def stop(step, x0, x, total):
        if step == STEPS - 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, sigmas, prompts, callback=stop)
    assert torch.equal(sample(model, sigmas, prompts), out)


def test_weights_are_as_before_after_unloading(experts, prompts):
    kept = [
        {name: value.clone() for name, value in model.model.diffusion_model.named_parameters()}
        for model in experts
    ]
    model = lora(join(*(lora(each, 1, 0.5) for each in experts)), 2, 0.5)
    sample(model, sigmas_of(shifted(model, 8.0)), prompts)
    comfy.model_management.unload_all_models()
    for patcher, before in zip(experts, kept, strict=True):
        for name, value in patcher.model.diffusion_model.named_parameters():
            assert torch.equal(value.cpu(), before[name].cpu()), name


def test_what_is_bound_to_weights_is_refused_after_and_taken_before(experts, prompts):
    high, low = experts
    sigmas = sigmas_of(shifted(high, 8.0))

    def passing(executor, *arguments, **more):
        return executor(*arguments, **more)

    def wrapped(model):
        model = model.clone()
        model.add_wrapper_with_key("apply_model", "compile", passing)
        return model

    def module(model):
        model = model.clone()
        model.add_object_patch("diffusion_model.head", model.model.diffusion_model.head)
        return model

    def option(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda apply, call: apply(call["input"]))
        return model

    for change, word in ((wrapped, "compile"), (module, "head"), (option, "function_wrapper")):
        with pytest.raises(FrugalError, match=word):
            sample(change(join(high, low)), sigmas, prompts)
    for change in (wrapped, module):
        model = join(change(high), change(low))
        assert torch.equal(sample(model, sigmas, prompts), sample(join(high, low), sigmas, prompts))


def test_a_step_cache_on_each_expert_works_as_by_hand(experts, prompts):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model):
        return EasyCacheNode.execute(shifted(model, 8.0), 10.0, 0.0, 1.0, False).args[0]

    high, low = (cached(model) for model in experts)
    steps = 10
    sigmas = sigmas_of(high, steps)
    count = experts_run.high_steps(sigmas, 0.875)
    out = sample(join(high, low), sigmas, prompts)
    assert torch.equal(out, by_hand(high, low, prompts, count, steps=steps))
    # Guard: the cache did skip steps.
    plain = join(*(shifted(model, 8.0) for model in experts))
    assert relative(out, sample(plain, sigmas, prompts)) > 1e-3
    with pytest.raises(FrugalError, match="easycache"):
        sample(cached(join(*experts)), sigmas, prompts)


def test_refused_runs(experts, prompts):
    high, low = experts
    model, sigmas = join(high, low), sigmas_of(shifted(high, 8.0))
    with pytest.raises(FrugalError, match="noise mask"):
        sample(model, sigmas, prompts, noise_mask=torch.ones(1, 1, 2, 8, 8))
    with pytest.raises(FrugalError, match=r"rises over 0.875 again at step 3"):
        sample(model, torch.tensor([1.0, 0.5, 0.9, 0.0]), prompts)
    basic = comfy.samplers.CFGGuider(join(high, low, cfg_low=2.0))
    basic.inner_set_conds({"positive": prompts[0]})
    start = torch.zeros(1, 16, 2, 8, 8)
    with torch.inference_mode(), pytest.raises(FrugalError, match="cfg_low_noise 2"):
        basic.sample(start, start, comfy.samplers.sampler_object("euler"), sigmas)


def test_pairs_that_are_none(experts, tmp_path):
    high, low = experts
    with pytest.raises(FrugalError, match="hold the same weights"):
        join(high, high.clone())
    with torch.inference_mode():
        again = load_run.load_wan(
            bed.write(
                tmp_path / "again.safetensors", bed.base(bed.weights(seed=1), torch.bfloat16)[0]
            )
        )[0]
        image = load_run.load_wan(
            bed.write(tmp_path / "i2v.safetensors", bed.base(bed.weights(bed.I2V))[0])
        )[0]
    sixteen = load_run.load_wan(
        bed.write(tmp_path / "one.safetensors", bed.base(bed.weights(seed=1), torch.bfloat16)[0])
    )[0]
    with pytest.raises(FrugalError, match="hold the same weights"):
        join(again, sixteen)
    with pytest.raises(FrugalError, match="differ in"):
        join(high, image)
    with pytest.raises(FrugalError, match="is a pair"):
        join(join(high, low), low)
    with pytest.raises(FrugalError, match="swap the two"):
        join(low, high)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(FrugalError, match="low_noise is a Linear"):
        join(high, comfy.model_patcher.ModelPatcher(other, "cpu", "cpu"))


@pytest.mark.parametrize(
    "folders", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")]
)
def test_swapped_experts_are_noticed_by_their_folders(folders, tmp_path):
    """Both files of such a release have one name."""
    pair = []
    for seed, folder in enumerate(folders, 1):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        bed.write(path, bed.base(bed.weights(seed=seed), torch.float32)[0])
        with torch.inference_mode():
            pair.append(load_run.load_wan(path, "fp32")[0])
    high, low = pair
    model = join(high, low)
    names = set(model.get_attachment(REPORT_KEY).files)
    assert {name.rpartition("/")[0].rpartition("/")[2] for name in names} == set(folders)
    with pytest.raises(FrugalError, match="swap the two"):
        join(low, high)


def test_node_reports_both_files(experts, monkeypatch):
    monkeypatch.setattr("frugal.nodes.wan.experts.show_text", lambda *_: None)
    node = FrugalWanTwoExperts.PREPARE_CLASS_CLONE({})
    model, text = node.execute(*experts, 0.9).args
    report = model.get_attachment(REPORT_KEY)
    folder = experts[0].get_attachment(REPORT_KEY).folder
    # The folder and the one above it, under whatever number pytest made it.
    assert re.fullmatch(r"pytest-\d+/experts\d+", folder)
    assert set(report.files) == {
        f"{which} noise {folder}/wan_{which}_noise.safetensors" for which in ("high", "low")
    }
    sizes = [sum(each.get_attachment(REPORT_KEY).formats.values()) for each in experts]
    assert sum(report.formats.values()) == sum(sizes)
    assert "timesteps 900 to 1000" in text and ours(model).boundary == 0.9
