"""With the constant part of cross-attention kept, a run gives the same latent to the bit and reads
fewer weights.
"""

from __future__ import annotations

import pytest
import torch

from frugal.nodes.wan import load_run
from frugal.tests.helpers import cross_kv as runs
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.native_formats import native_file

pytestmark = pytest.mark.numeric

PLAIN = {"T2V": bed.T2V, "I2V": bed.I2V, "VACE": bed.VACE}


def load(folder, tensors, metadata=None, dtype="fp32"):
    path = bed.write(folder / "wan.safetensors", tensors, metadata)
    with torch.inference_mode():
        return load_run.load_wan(path, dtype)[0]


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return load(tmp_path_factory.mktemp("t2v"), bed.base(bed.weights(), torch.float32)[0])


def given(config):
    return runs.prompts(**(runs.image() if config.image else {}))


@pytest.mark.parametrize(
    "kind, dtype",
    [*((kind, torch.float32) for kind in PLAIN), ("T2V", torch.bfloat16), ("I2V", torch.bfloat16)],
)
def test_same_latent_and_fewer_weights(kind, dtype, tmp_path):
    config = PLAIN[kind]
    model = load(tmp_path, bed.base(bed.weights(config), torch.float32)[0])
    model.set_model_compute_dtype(dtype)
    changed, reports, plan = runs.constant(model)
    before = runs.weights_of(model)
    prompts = given(config)
    wanted = runs.sample(model, prompts)
    assert torch.equal(runs.sample(changed, prompts), wanted)
    layers = 2 * (4 if config.image else 2) + 2 * config.vace_layers
    assert plan.layers == layers
    assert (reports[0].computed, reports[0].calls) == (layers, runs.STEPS)
    assert reports[0].reused == layers * (runs.STEPS - 1)
    assert (reports[0].notes, reports[0].dropped) == ((), 0)

    assert runs.same_weights(runs.weights_of(model), before)
    if dtype != torch.float32:
        return
    assert not torch.equal(runs.sample(changed, [prompts[0], prompts[0]]), wanted)
    stock, ours = runs.touched(model, prompts), runs.touched(changed, prompts)
    spared = {
        name
        for name in stock[0]
        if any(f"cross_attn.{suffix}." in name for suffix in ("k", "v", "k_img", "v_img"))
    }
    assert len(spared) == 2 * layers
    assert stock == [stock[0]] * runs.STEPS
    assert ours == [stock[0]] + [stock[0] - spared] * (runs.STEPS - 1)


def layouts():
    source = bed.weights()
    found = {
        "fp8 scaled": bed.scaled(source, bed.E4, marker=torch.zeros(2, dtype=bed.E4))[:2],
        "fp8 per channel": bed.scaled(source, bed.E4, rows=True, **bed.ONE_STEP)[:2],
        "GPTQ 4 bits": bed.gptq_or_awq(source)[:2],
    }
    import comfy.quant_ops

    if "asym_w4a8_int8" in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        label, layers = "int8 ConvRot", bed.block_linears(source)
        found[label] = native_file(label, source=source, layers=layers, header=False)[:2]
    return found


LAYOUTS = layouts()


@pytest.mark.parametrize("label", LAYOUTS)
def test_quantised_layers(label, tmp_path):
    model = load(tmp_path, *LAYOUTS[label], dtype="default")
    changed, reports, plan = runs.constant(model)
    wanted = runs.sample(model)
    assert torch.equal(runs.sample(changed), wanted)
    assert reports[0].reused == plan.layers * (runs.STEPS - 1)
    stock, ours = runs.touched_bytes(model), runs.touched_bytes(changed)
    assert ours[0] == stock[0] and ours[1:] == [ours[1]] * (runs.STEPS - 1)
    # The plan counts scales too; the memory that the counter knows is that of the weights.
    assert 0.9 * plan.weight_bytes < stock[1] - ours[1] <= plan.weight_bytes


@pytest.mark.parametrize("first", ["compile", "cache"])
def test_beside_a_network_compiled_as_a_whole(t2v, first):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    reports, prompts = [], given(bed.T2V)

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(clone, backend="eager")
        return clone

    def cached(model):
        changed, found, _ = runs.constant(model)
        reports.append(found)
        return changed

    model = cached(compiled(t2v)) if first == "compile" else compiled(cached(t2v))
    wanted = runs.sample(compiled(t2v), prompts)
    made = runs.sample(model, prompts)
    assert float((made - wanted).norm() / wanted.norm()) < 1e-5
    assert reports[0][0].reused > 0
