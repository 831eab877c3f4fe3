"""The pack's nodes before the two experts are joined, and after: the same video, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from frugal.nodes.lora import apply, file
from frugal.nodes.memory import cross_kv_run
from frugal.nodes.sampling import (
    attention_run,
    compile_run,
    guidance_range_run,
    preview,
    sampler_run,
    step_cache_run,
)
from frugal.nodes.wan import experts_run, load_run
from frugal.tests.helpers import wan as bed
from frugal.tests.nodes.wan import test_wan_experts as runs

pytestmark = pytest.mark.card

experts, prompts = runs.experts, runs.prompts
EAGER = "eager"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A DoRA with a change of the modulation: both take the weights of the expert they are on."""
    make = torch.Generator().manual_seed(3)
    name = "diffusion_model.blocks.0"
    held = {f"{name}.diff_m": 0.3 * torch.randn(1, 6, 256, generator=make)}
    for layer in ("self_attn.q", "ffn.2"):
        width = 512 if layer == "ffn.2" else 256
        held |= {
            f"{name}.{layer}.lora_B.weight": torch.randn(256, 4, generator=make) / 2,
            f"{name}.{layer}.lora_A.weight": torch.randn(4, width, generator=make) / width**0.5,
            f"{name}.{layer}.lora_magnitude_vector": 1 + torch.rand(256, generator=make),
        }
    return bed.write(tmp_path_factory.mktemp("lora") / "dora.safetensors", held)


def changes(lora):
    def beside(model):
        with torch.inference_mode():
            return apply.apply(model, file.read(lora, model.model), 0.8)[0]

    return {
        "attention": lambda model: attention_run.apply(model, "torch-math"),
        "compile": lambda model: compile_run.apply(model, backend=EAGER),
        "step cache": lambda model: step_cache_run.apply(
            model, step_cache_run.Options(0.9, 0.0, 1.0), lambda _: None
        ),
        "guidance": lambda model: guidance_range_run.apply(model, 0.0, 0.5),
        "preview": preview.apply,
        "context": lambda model: cross_kv_run.apply(model, cross_kv_run.Options(), lambda _: None)[
            0
        ],
        "lora": beside,
    }


@pytest.mark.parametrize(
    "label", ["attention", "compile", "step cache", "guidance", "preview", "context", "lora"]
)
def test_after_is_before(label, experts, prompts, lora):
    change = changes(lora)[label]
    sigmas = runs.sigmas_of(experts[0], 8)
    before = runs.sample(runs.join(*map(change, experts)), sigmas, prompts)
    after = runs.sample(change(runs.join(*experts)), sigmas, prompts)
    assert torch.equal(before, after)
    plain = runs.sample(runs.join(*experts), sigmas, prompts)
    if label in ("guidance", "lora"):
        assert runs.relative(after, plain) > 1e-3
    # The pair that was changed stays as it was.
    assert torch.equal(plain, runs.sample(runs.join(*experts), sigmas, prompts))


def test_any_order_of_several(experts, prompts, lora):
    made = changes(lora)
    chosen = [made[name] for name in ("guidance", "lora", "compile")]
    sigmas = runs.sigmas_of(experts[0], 4)

    def of(model, given):
        for change in given:
            model = change(model)
        return model

    expected = runs.sample(runs.join(*(of(each, chosen) for each in experts)), sigmas, prompts)
    for given in itertools.permutations(chosen):
        for place in (0, 1, 3):
            pair = runs.join(*(of(each, given[:place]) for each in experts))
            assert torch.equal(runs.sample(of(pair, given[place:]), sigmas, prompts), expected)


def test_comfyuis_own_patches_stay_on_both(experts, prompts, lora):
    """A LoRA of ComfyUI's loader put on the pair, then one beside the layers."""
    side = changes(lora)["lora"]
    sigmas = runs.sigmas_of(experts[0], 4)

    def patched(model):
        model = model.clone()
        change = torch.full((64,), 0.2)
        model.add_patches({"diffusion_model.head.head.bias": ("diff", (change,))}, 0.5)
        return model

    expected = runs.sample(runs.join(*(side(patched(each)) for each in experts)), sigmas, prompts)
    for model in (side(patched(runs.join(*experts))), patched(side(runs.join(*experts)))):
        assert torch.equal(runs.sample(model, sigmas, prompts), expected)


@pytest.mark.parametrize("preset", ["quality", "balanced", "draft", "distilled"])
def test_presets(preset, experts, prompts):
    job = sampler_run.Job(1, 4, 3.0, "euler", "simple", 1.0, preset)
    latent = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    with torch.inference_mode():
        found, _ = sampler_run.run(runs.join(*experts), *prompts, latent, job)
    assert found["samples"].isfinite().all()


def test_pair_stays_a_pair(experts, lora):
    model = changes(lora)["lora"](runs.join(*experts, 0.8, 2.0))
    (switch,) = model.wrappers["outer_sample"][experts_run.KEY]
    assert (switch.boundary, switch.cfg_low) == (0.8, 2.0)
    assert load_run.REPORT_KEY in model.attachments
