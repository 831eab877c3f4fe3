"""What a run keeps is bounded, gone afterwards, and nothing of the MODEL is different; weights that
leave the device come back whole.
"""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_api.v0_0_2 import io

from frugal.kernels.errors import FrugalError
from frugal.nodes.memory import cross_kv, cross_kv_run
from frugal.nodes.memory.cross_kv import EXACT, FP8, FrugalWanConstantContext
from frugal.nodes.wan import load_run
from frugal.tests.helpers import cross_kv as runs
from frugal.tests.helpers import lora
from frugal.tests.helpers import wan as bed

LAYERS = 4


@pytest.fixture
def t2v(tmp_path):
    path = bed.write(tmp_path / "wan.safetensors", bed.base(lora.SOURCE, torch.float32)[0])
    with torch.inference_mode():
        return load_run.load_wan(path, "fp32")[0]


def instance_state(model) -> dict:
    """Whatever the layers carry on themselves beside weights."""
    return {
        path: {key for key in module.__dict__ if key == "forward"}
        for path, module in model.model.named_modules()
    }


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("error", [Cancelled, RuntimeError, None])
def test_nothing_is_left_after_a_run(t2v, error, monkeypatch):
    """Finished, cancelled or failed: no forward, no wrapper, no tensor."""
    kept = []
    keep = cross_kv_run.keep

    def watched(*args):
        rows = keep(*args)
        kept.append(weakref.ref(rows.rows))
        return rows

    monkeypatch.setattr(cross_kv_run, "keep", watched)
    before, weights = instance_state(t2v), runs.weights_of(t2v)
    changed, reports, _ = runs.constant(t2v)

    def callback(step, *_):
        assert all(ref() is not None for ref in kept) and len(kept) == LAYERS
        if error and step == 1:
            raise error

    if error:
        with pytest.raises(error):
            runs.sample(changed, callback=callback)
        assert not reports
    else:
        runs.sample(changed, callback=callback)
        assert reports[0].contexts == 1
    gc.collect()
    assert len(kept) == LAYERS and all(ref() is None for ref in kept)
    assert instance_state(t2v) == before
    assert runs.same_weights(runs.weights_of(changed), weights)
    assert cross_kv_run.KEY not in t2v.wrappers.get("sampler_sample", {})
    options = changed.model_options["transformer_options"]
    assert cross_kv_run.KEY not in options.get("wrappers", {}).get("apply_model", {})
    assert torch.equal(runs.sample(changed), runs.sample(t2v))


def test_failure_inside_a_layer(t2v):
    changed, *_ = runs.constant(t2v)
    before = instance_state(t2v)
    prompts = runs.prompts()
    prompts[0][0][0] = torch.randn(1, 7, 4096 - 1)
    with pytest.raises(RuntimeError):
        runs.sample(changed, prompts)
    assert instance_state(t2v) == before
    assert torch.equal(runs.sample(changed), runs.sample(t2v))


def test_saved_model_is_whole(t2v, tmp_path):
    """As ComfyUI's save nodes write it, with a LoRA merged."""
    merged = comfy.sd.load_lora_for_models(t2v, None, runs.lora(1), 0.7, 0.0)[0]
    changed, *_ = runs.constant(merged)
    runs.sample(changed)
    paths = [tmp_path / "stock.safetensors", tmp_path / "ours.safetensors"]
    for model, path in zip((merged, changed), paths, strict=True):
        comfy.model_management.load_models_gpu([model], force_patch_weights=True)
        comfy.sd.save_checkpoint(path, model)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    comfy.model_management.unload_all_models()
    for name, tensor in lora.SOURCE.items():
        held = t2v.model.diffusion_model.get_parameter(name)
        assert torch.equal(held, tensor), name


def test_weights_leave_after_the_first_call_that_needs_none(t2v, monkeypatch):
    """With the decision forced: on the CPU there is nowhere to go, but ComfyUI counts all the same
    and treats the layers as offloaded from then on.
    """
    monkeypatch.setattr(cross_kv_run, "leaves_device", lambda patcher: True)
    wanted = runs.sample(t2v)
    whole = t2v.model.model_loaded_weight_memory
    changed, reports, _ = runs.constant(t2v)
    planned = cross_kv_run.plan(t2v, cross_kv_run.Options())
    steps = []

    def callback(*_):
        steps.append(t2v.model.model_loaded_weight_memory)

    assert torch.equal(runs.sample(changed, callback=callback), wanted)
    size = planned.weight_bytes
    assert reports[0].released == size > 0
    assert steps == [whole] + [whole - size] * (runs.STEPS - 1)
    layers = cross_kv_run.projections(t2v.model.diffusion_model).values()
    assert [layer.comfy_patched_weights for layer in layers] == [False] * LAYERS
    assert "_load_list" not in changed.__dict__
    # The next run, and one of the model without the node, load them again.
    assert torch.equal(runs.sample(changed), wanted)
    assert torch.equal(runs.sample(t2v), wanted)
    kept, more, _ = runs.constant(t2v, release=False)
    assert torch.equal(runs.sample(kept), wanted) and more[0].released == 0


def test_released_layers_keep_their_lora(t2v, monkeypatch):
    """A prompt that comes after the weights left is computed from the offloaded weight with the
    LoRA added on the way; after the MODEL is unloaded, its weights are those of the file.
    """
    monkeypatch.setattr(cross_kv_run, "leaves_device", lambda patcher: True)
    merged = comfy.sd.load_lora_for_models(t2v, None, runs.lora(1), 0.7, 0.0)[0]
    late = [[runs.text(7), {"start_percent": 0.5, "end_percent": 1.0}]]
    prompts = [runs.prompts(5)[0] + late, runs.prompts(6)[0]]
    changed, reports, _ = runs.constant(merged)
    wanted, out = runs.sample(merged, prompts), runs.sample(changed, prompts)
    assert reports[0].released and reports[0].computed > LAYERS
    assert bed.relative(out, wanted) < 1e-5
    assert bed.relative(out, runs.sample(t2v, prompts)) > 1e-3
    comfy.model_management.unload_all_models()
    for name, tensor in lora.SOURCE.items():
        assert torch.equal(t2v.model.diffusion_model.get_parameter(name), tensor), name
    for layer in cross_kv_run.projections(t2v.model.diffusion_model).values():
        assert not layer.weight_function and not hasattr(layer, "comfy_patched_weights")


def test_where_weights_stay(t2v):
    """On one device, with dynamic memory, and while a prompt's hooks hold copies of weights."""

    class Patcher:
        load_device, offload_device = torch.device("cuda"), torch.device("cpu")
        hook_patches, current_hooks = {}, None

    class Dynamic(Patcher):
        def is_dynamic(self):
            return True

    assert cross_kv_run.leaves_device(Patcher()) and not cross_kv_run.leaves_device(Dynamic())
    for name, value in (
        ("offload_device", Patcher.load_device),
        ("hook_patches", {"hook": {}}),
        ("current_hooks", "hooks"),
    ):
        other = Patcher()
        setattr(other, name, value)
        assert not cross_kv_run.leaves_device(other)


def test_padding_is_kept_once(t2v):
    changed, reports, _ = runs.constant(t2v)
    runs.sample(changed)
    rows, width = runs.WORDS + 1, bed.T2V.dim
    text = 2 * runs.ROWS * width * 4
    assert reports[0].bytes == text + LAYERS * 2 * rows * width * 4


def test_fp8_takes_a_quarter_of_fp32_and_rounds(t2v):
    exact, reports, _ = runs.constant(t2v)
    rounded, more, _ = runs.constant(t2v, fp8=True)
    wanted, out = runs.sample(exact), runs.sample(rounded)
    rows, width = 2 * (runs.WORDS + 1), bed.T2V.dim
    assert reports[0].bytes - more[0].bytes == LAYERS * rows * (4 * width - (width + 4))
    assert 0 < bed.relative(out, wanted) < 0.05


def execute(**inputs):
    hidden = {io.Hidden.unique_id: "7"}
    # Newer versions look for them under a name of their own.
    clone = FrugalWanConstantContext.PREPARE_CLASS_CLONE({**hidden, "hidden_inputs": hidden})
    with torch.inference_mode():
        return getattr(clone, FrugalWanConstantContext.FUNCTION)(**inputs).result


def test_node(t2v, monkeypatch):
    shown = []
    monkeypatch.setattr(cross_kv, "show_text", lambda *args: shown.append(args))
    inputs = {"kv_dtype": EXACT, "contexts": 8, "release_weights": True}
    changed, report = execute(wan_model=t2v, **inputs)
    assert report.startswith("4 cross-attention projections: 1.1 MB, 16.6 % of the blocks'")
    assert torch.equal(runs.sample(changed), runs.sample(t2v))
    assert [node for node, _ in shown] == ["7", "7"]
    assert "12 layer results reused, 4 computed, in 4 calls" in shown[1][1]
    rounded, _ = execute(wan_model=t2v, **inputs | {"kv_dtype": FP8})
    assert bed.relative(runs.sample(rounded), runs.sample(t2v)) > 0


def test_other_models_are_refused(t2v):
    class Other:
        model = torch.nn.Module()

    Other.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(FrugalError, match="the model is a Module; expected a Wan model"):
        execute(wan_model=Other, kv_dtype=EXACT, contexts=8, release_weights=True)
