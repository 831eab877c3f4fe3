"""What changes a model or a prompt during and between runs reaches a run that keeps its contexts:
each gives the latent of the same run without.
"""

from __future__ import annotations

import inspect
from types import MethodType

import comfy.hooks
import comfy.sd
import pytest
import torch

from frugal.nodes.memory import cross_kv_run
from frugal.nodes.wan import experts_run, load_run
from frugal.tests.helpers import cross_kv as runs
from frugal.tests.helpers import lora
from frugal.tests.helpers import wan as bed

LAYERS = 4


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    path = tmp_path_factory.mktemp("t2v") / "wan.safetensors"
    bed.write(path, bed.base(lora.SOURCE, torch.float32)[0])
    with torch.inference_mode():
        return load_run.load_wan(path, "fp32")[0]


def check(model, given=None, **more):
    """The report of a run that gives the latent of `model`, and that latent."""
    changed, reports, _ = runs.constant(model)
    wanted = runs.sample(model, given, **more)
    assert torch.equal(runs.sample(changed, given, **more), wanted)
    return reports[0], wanted


def differs(one, other) -> bool:
    return bed.relative(one, other) > 1e-3


def merged(model, seed, strength):
    return comfy.sd.load_lora_for_models(model, None, runs.lora(seed), strength, 0.0)[0]


def test_loras_between_runs_and_clones_between_each_other(t2v):
    """Three clones share weights in memory and take turns."""
    clones = [t2v, merged(t2v, 1, 0.7), merged(merged(t2v, 1, 0.7), 2, -0.4)]
    wanted = [runs.sample(clone) for clone in clones]
    assert differs(wanted[0], wanted[1]) and differs(wanted[1], wanted[2])
    changed = [runs.constant(clone)[0] for clone in clones]
    for place in (0, 1, 2, 1, 0, 2):
        assert torch.equal(runs.sample(changed[place]), wanted[place])
    stronger = merged(changed[0], 1, 0.7)
    assert torch.equal(runs.sample(stronger), wanted[1]), "the LoRA may come after the node"


@pytest.mark.parametrize("first", ["lora", "cross-attention cache"])
def test_lora_beside_the_weights(t2v, first, tmp_path):
    beside = lora.put(t2v, tmp_path, runs.lora(3), 0.8)[0]
    wanted = runs.sample(beside)
    assert differs(wanted, runs.sample(t2v))
    if first == "lora":
        changed, reports, _ = runs.constant(beside)
    else:
        changed, reports, _ = runs.constant(t2v)
        changed = lora.put(changed, tmp_path, runs.lora(3), 0.8)[0]
    assert torch.equal(runs.sample(changed), wanted)
    assert (reports[0].computed, reports[0].notes) == (LAYERS, ())


def test_bypassed_lora(t2v):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypassed LoRAs")
    model = comfy.sd.load_bypass_lora_for_models(t2v, None, runs.lora(3), 0.8, 0.0)[0]
    report, wanted = check(model)
    assert differs(wanted, runs.sample(t2v))
    assert (report.computed, report.notes) == (LAYERS, ())


def hooked(strengths, prompt, seed=4):
    """The prompt with a LoRA hook whose strength follows (start, factor) pairs."""
    group = comfy.hooks.create_hook_lora(runs.lora(seed), 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for start, factor in strengths:
        frames.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
    group.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning(prompt, group)


def test_weight_hooks_that_change_over_the_steps(t2v):
    positive, negative = runs.prompts()
    scheduled = [hooked([(0.0, 1.0), (0.5, 0.2)], positive), negative]
    report, wanted = check(t2v, scheduled)
    # positive at two strengths, negative without the hook.
    assert report.computed == 3 * LAYERS
    for other in ([(0.0, 1.0)], [(0.0, 0.2)]):
        assert differs(wanted, runs.sample(t2v, [hooked(other, positive), negative]))
    report, wanted = check(t2v, [hooked([(0.0, 1.0)], positive), negative])
    assert report.computed == 2 * LAYERS
    assert not differs(runs.sample(t2v), check(t2v)[1])


def test_prompt_that_travels(t2v):
    first = [[runs.text(5), {"start_percent": 0.0, "end_percent": 0.5}]]
    then = [[runs.text(7), {"start_percent": 0.5, "end_percent": 1.0}]]
    negative = runs.prompts(6)[0]
    report, wanted = check(t2v, [first + then, negative])
    # A step that lies on the border gets both.
    assert report.contexts in (2, 3) and report.computed == report.contexts * LAYERS
    assert differs(wanted, runs.sample(t2v, [runs.prompts(5)[0], negative]))
    assert differs(wanted, runs.sample(t2v, [runs.prompts(7)[0], negative]))


def test_prompts_for_regions(t2v):
    half = torch.zeros(1, 8, 8)
    half[..., :4] = 1
    left, right = ([[runs.text(seed), {"mask": mask}]] for seed, mask in ((5, half), (7, 1 - half)))
    report, wanted = check(t2v, [left + right, runs.prompts(6)[0]])
    assert report.reused == report.computed * (runs.STEPS - 1)
    swapped = [[runs.text(7), {"mask": half}], [runs.text(5), {"mask": 1 - half}]]
    assert differs(wanted, runs.sample(t2v, [swapped, runs.prompts(6)[0]]))


def test_guidance_in_two_calls(t2v, monkeypatch):
    """Where memory is short ComfyUI calls the model for one prompt at a time."""
    monkeypatch.setattr(t2v.model, "memory_required", lambda *args, **kwargs: 1e30)
    report, wanted = check(t2v)
    assert report.calls == 2 * runs.STEPS
    assert (report.contexts, report.computed) == (2, 2 * LAYERS)
    changed, reports, _ = runs.constant(t2v, limit=1)
    assert torch.equal(runs.sample(changed), wanted)
    assert reports[0].reused == 0 and reports[0].dropped == 2 * runs.STEPS - 1


def test_two_videos_without_guidance(t2v):
    report, _ = check(t2v, cfg=1.0, batch=2)
    assert (report.calls, report.contexts) == (runs.STEPS, 1)


def test_context_windows(t2v):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Windows

    accepted = inspect.signature(Windows.execute).parameters
    more = {"freenoise": False} if "freenoise" in accepted else {}
    model = Windows.execute(t2v, 17, 4, "standard_static", 1, False, "pyramid", **more)[0]
    report, wanted = check(model, frames=9)
    assert report.calls > runs.STEPS and report.computed == LAYERS
    assert differs(wanted, runs.sample(t2v, frames=9))


def test_attention_with_a_second_text(t2v):
    """NAG as custom nodes put it on Wan: the attention's own forward is replaced, and the layers
    are asked for two texts.
    """
    negative = torch.randn(1, 8, bed.T2V.dim, generator=torch.Generator().manual_seed(9))

    def forward(self, x, context, transformer_options={}, **kwargs):  # noqa: B006
        outs = []
        for each in (context, negative.to(context).expand(context.shape[0], -1, -1)):
            q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(each)), self.v(each)
            outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        return self.o(2.0 * outs[0] - outs[1])

    model = t2v.clone()
    for number, block in enumerate(model.model.diffusion_model.blocks):
        bound = MethodType(forward, block.cross_attn)
        model.add_object_patch(f"diffusion_model.blocks.{number}.cross_attn.forward", bound)
    report, wanted = check(model)
    assert differs(wanted, runs.sample(t2v))
    assert (report.computed, report.contexts, report.notes) == (2 * LAYERS, 2, ())


def test_block_that_writes_to_the_text(t2v):
    """A block replacement may hand the next block another text in the same memory, and another in
    each step.
    """

    def replace(args, extra):
        args["txt"].mul_(1 + args["transformer_options"]["sigmas"][0])
        return extra["original_block"](args)

    model = t2v.clone()
    model.set_model_patch_replace(replace, "dit", "double_block", 1)
    report, wanted = check(model)
    assert differs(wanted, runs.sample(t2v))
    assert (report.computed, report.contexts) == (2 + 2 * runs.STEPS, 1 + runs.STEPS)


def test_attention_override_sees_the_same_tensors(t2v):
    def recording(seen):
        def override(function, q, k, v, *args, **kwargs):
            seen.append([tensor.clone() for tensor in (q, k, v)])
            assert all(tensor.is_contiguous() for tensor in (k, v))
            return function(q, k, v, *args, **kwargs)

        model = t2v.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    ours, stock = [], []
    runs.sample(runs.constant(recording(ours))[0])
    runs.sample(recording(stock))
    assert len(ours) == len(stock) == 4 * runs.STEPS
    for one, other in zip(ours, stock, strict=True):
        assert all(map(torch.equal, one, other))


def test_compiled_attention(t2v):
    """One of two, for tracing is slow."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    model = t2v.clone()
    keys = ["diffusion_model.blocks.0.cross_attn"]
    set_torch_compile_wrapper(model, backend="eager", keys=keys)
    report, wanted = check(model, cfg=1.0)
    assert not differs(wanted, runs.sample(t2v, cfg=1.0))
    assert (report.computed, report.reused) == (LAYERS, LAYERS * (runs.STEPS - 1))


def test_layers_that_may_change_are_left_alone_and_named(t2v):
    """A forward and a weight function of unknown make, with a strength of their own."""
    calls = [0]

    def forward(self, x):
        calls[0] += 1
        return type(self).forward(self, x) * (1 + 0.1 * calls[0])

    model = t2v.clone()
    layer = model.model.diffusion_model.blocks[0].cross_attn.k
    path = "diffusion_model.blocks.0.cross_attn.k"
    model.add_object_patch(f"{path}.forward", MethodType(forward, layer))

    def grow(weight):
        calls[0] += 1
        return weight * (1 + 0.1 * calls[0])

    model.add_weight_wrapper("diffusion_model.blocks.1.cross_attn.v.weight", grow)
    model.set_model_compute_dtype(torch.float32)
    wanted = runs.sample(model)
    changed, reports, _ = runs.constant(model)
    calls[0] = 0
    assert torch.equal(runs.sample(changed), wanted)
    notes = reports[0].notes
    assert reports[0].computed == LAYERS - 2 and len(notes) == 2
    assert "blocks.0.cross_attn.k among them: another node changed how they compute" in notes[0]
    assert "blocks.1.cross_attn.v among them: another node changes their weights" in notes[1]


def test_training_keeps_its_graph(t2v):
    """With gradients on, every call is the model's own."""
    run, active = cross_kv_run._Run(cross_kv_run.Options()), []

    class Executor:
        class_obj = t2v.model

        def __call__(self, *args, **kwargs):
            active.append(run.caches[t2v.model].active)

    t2v.pre_run()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            run(Executor(), torch.zeros(1), torch.zeros(1))
    t2v.cleanup()
    assert active == [False, True] and run.calls == 1


def test_two_experts(t2v, tmp_path):
    path = bed.write(tmp_path / "low.safetensors", bed.weights(seed=2))
    with torch.inference_mode():
        low = load_run.load_wan(path, "fp32")[0]
    wanted = runs.sample(experts_run.join(t2v, low, 0.9, 0.0)[0])
    high_ours, high_reports, _ = runs.constant(t2v)
    low_ours, low_reports, _ = runs.constant(low)
    assert torch.equal(runs.sample(experts_run.join(high_ours, low_ours, 0.9, 0.0)[0]), wanted)
    assert high_reports[0].calls + low_reports[0].calls == runs.STEPS
    assert high_reports[0].computed == low_reports[0].computed == LAYERS
    # The other way round it goes on both of the pair.
    joined = experts_run.join(t2v, low, 0.9, 0.0)[0]
    assert torch.equal(runs.sample(runs.constant(joined)[0]), wanted)


def test_the_node_twice_is_the_node_once(t2v):
    once, first, _ = runs.constant(t2v, fp8=True)
    twice, reports, _ = runs.constant(once)
    assert torch.equal(runs.sample(twice), runs.sample(t2v))
    assert not first and reports[0].computed == LAYERS
