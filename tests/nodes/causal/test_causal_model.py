"""A model made causal keeps everything that was put on it, and gives back the model it was."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes.causal import model_run
from frugal.nodes.causal.sampler_run import Job
from frugal.tests.helpers import causal as videos
from frugal.tests.helpers import cross_kv as runs
from frugal.tests.helpers import dynamic_vram, lora
from frugal.tests.helpers import wan as bed


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return videos.load(tmp_path_factory.mktemp("causal"))


def test_the_model_itself_is_as_it_was(plain):
    before, weights = runs.sample(plain), runs.weights_of(plain)
    causal = videos.causal(plain, window=4)
    videos.make(causal, 4)
    assert torch.equal(runs.sample(plain), before)
    assert runs.same_weights(runs.weights_of(plain), weights)
    with pytest.raises(FrugalError, match="causal model in an ordinary sampler"):
        runs.sample(causal)
    assert torch.equal(runs.sample(plain), before)
    # Made causal twice, it is causal once, with the later options.
    again = videos.causal(causal, window=0)
    assert torch.equal(videos.make(again, 6), videos.make(videos.causal(plain), 6))


def test_lora_and_overrides_reach_every_layer(plain, tmp_path):
    layers = [name for name in bed.block_linears(lora.SOURCE) if "attn" in name]
    tensors, dense = lora.lora(layers)
    import comfy.sd

    with torch.inference_mode():
        model = comfy.sd.load_lora_for_models(plain, None, tensors, 1.0, 0)[0]
    seen = []

    def override(func, q, k, v, *args, **kwargs):
        seen.append(k.shape[1] // 16)
        return func(q, k, v, *args, **kwargs)

    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options[model_run.ATTENTION_OVERRIDE] = override
    made = videos.make(videos.causal(model, window=4), 6)
    changed = lora.with_changes(bed.weights(), (dense, 1.0))
    network = videos.stock(videos.load(tmp_path, weights=changed))
    wanted = videos.Reference(network, window=4).make(6)
    assert videos.far(made, wanted) < 1e-5
    assert videos.far(made, videos.make(videos.causal(plain, window=4), 6)) > 1e-3
    # 8 calls of the model (2 steps, a clean pass but for the last block), 2 layers, each with
    # attention over the frames (2, then 4, then 4 in the window) and over the prompt's 50 rows.
    assert sorted(seen) == sorted([2] * 6 + [4] * 10 + [50 // 16] * 16)


def test_attention_patches_are_called(plain):
    import inspect

    import comfy.ldm.wan.model

    if "attn1_patch" not in inspect.getsource(comfy.ldm.wan.model):
        pytest.skip("Wan of this ComfyUI has no attention patches")
    model, calls = plain.clone(), []

    def halve(args):
        calls.append(args["x"].shape)
        return args["x"] * 0.5

    model.set_model_attn1_patch(halve)
    made = videos.make(videos.causal(model), 4)
    assert len(calls) == 2 * (2 + 1 + 2)
    assert videos.far(made, videos.make(videos.causal(plain), 4)) > 1e-3


def test_start_images_go_with_their_block(tmp_path):
    """Image to video: the block's own frames of the image, and its cross-attention."""
    model = videos.load(tmp_path, bed.I2V)
    make = torch.Generator().manual_seed(4)
    image = runs.image() | {
        "concat_latent_image": torch.randn(1, 16, 4, 8, 8, generator=make),
        "concat_mask": torch.rand(1, 1, 4, 8, 8, generator=make).round(),
    }
    seen = []

    def watch(executor, x, t, context, clip_fea=None, *args, **kwargs):
        seen.append((x.shape[2], x[:, 16:].clone(), clip_fea.shape[1]))
        return executor(x, t, context, clip_fea, *args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    causal = videos.causal(model)
    causal.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    made = videos.make(causal, 4, extra=image)
    blocks = [part for _, part, _ in seen]
    assert [(frames, rows) for frames, _, rows in seen] == [(2, 257)] * 5
    assert torch.equal(blocks[0], blocks[2])
    assert torch.equal(blocks[3], blocks[4])
    whole = []
    plain = model.clone()
    plain.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL,
        "watch",
        lambda executor, x, *args, **kwargs: (
            whole.append(x[:, 16:]) or executor(x, *args, **kwargs)
        ),
    )
    runs.sample(plain, [[[videos.prompt_of(5), image]], [[videos.prompt_of(6), image]]], frames=4)
    assert torch.equal(torch.cat([blocks[0], blocks[3]], dim=2), whole[0][:1])
    other = image | {"clip_vision_output": runs.image(2)["clip_vision_output"]}
    assert videos.far(videos.make(causal, 4, extra=other), made) > 1e-4


def test_room_is_made_for_one_block_and_the_cache(plain, monkeypatch):
    """ComfyUI is told the frames of a block, and the cache as the frames it is worth."""
    import comfy.model_management

    asked = []
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **more):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    def room(model, frames):
        asked.clear()
        model = model.clone()
        needs = model_run.Needs(block=2, known=0, sides=2)
        model.model_options["transformer_options"][model_run.NEEDS] = needs
        videos.make(model, frames, cfg=3.0, sigmas=torch.tensor([1.0, 0.0]))
        return asked[0]

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    windowed = videos.causal(plain, window=4, sink=1)
    assert room(windowed, 6) == room(windowed, 12) > 0
    assert room(videos.causal(plain), 12) > room(videos.causal(plain), 6)

    def frames(model, total):
        shapes = []
        model_run.count_cache(
            lambda model, shape, *more: shapes.append(shape),
            model, [1, 16, total, 8, 8], {"positive": [1], "negative": [1]}, model.model_options,
        )  # fmt: skip
        return shapes[0][2]

    # 2 conditions, 2 layers and one being gathered, 5 frames of 16 tokens of 256 wide fp32 K and V;
    # what the sampler does not say is taken as the window.
    each = plain.memory_required([1, 16, 1, 8, 8])
    size = 2 * (2 + 1) * 5 * 2 * 16 * 256 * 4
    assert frames(windowed, 100) == 4 + -(-size // each)
    # From main memory come this layer's pages and the next one's, beside the one being gathered.
    hosted = videos.causal(plain, window=4, sink=1, on_host=True)
    assert frames(hosted, 100) == 4 + -(-size // each)


@pytest.mark.parametrize("at", range(5))
def test_a_cancel_leaves_the_past_and_nothing_else(plain, at):
    model = videos.causal(plain, window=4)
    job = Job(keep=True)
    videos.make(model, 4, job=job)
    pool, before = job.cache.pool, job.cache.pool.used_bytes
    branch, count = job.cache.fork(), iter(range(100))

    def cancel(*_):
        if next(count) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        videos.make(model, 6, job=Job(cache=branch), first=4, callback=cancel)
    branch.release()
    assert pool.used_bytes == before
    alone = Job(keep=True)
    videos.make(model, 4, job=alone)
    wanted = videos.make(model, 2, job=Job(cache=alone.cache), first=4)
    assert torch.equal(videos.make(model, 2, job=Job(cache=job.cache), first=4), wanted)


def test_what_cannot_be_causal_is_refused(plain, tmp_path):
    with pytest.raises(FrugalError, match="a VaceWanModel"):
        videos.causal(videos.load(tmp_path, bed.VACE))
    model = videos.causal(plain, window=4)
    for sigmas in ([1.0, 0.5, 0.1], [1.0, 0.5, 0.6, 0.0]):
        with pytest.raises(FrugalError, match="fall down to 0"):
            videos.make(model, 2, sigmas=torch.tensor(sigmas))
    with pytest.raises(FrugalError, match="block of 5 frames and a window of 4"):
        videos.make(model, 6, block=5)
    with pytest.raises(FrugalError, match="not causal"):
        videos.make(plain, 2)
    with pytest.raises(FrugalError, match=r"needs .* at most"):
        videos.make(videos.causal(plain, window=4, budget=1000), 2)
    job = Job(keep=True)
    videos.make(model, 2, job=job)
    with pytest.raises(FrugalError, match="condition 1 appears"):
        videos.make(model, 2, job=Job(cache=job.cache), cfg=3.0)
    with pytest.raises(FrugalError, match="a session of 2 layers"):
        videos.make(model, 2, job=Job(cache=job.cache), batch=2)
    half = plain.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    far = Job(keep=True)
    videos.make(videos.causal(half, window=2), 2, job=far)
    far.cache.next_frame = 256
    with pytest.raises(FrugalError, match="latent frame 257 in"):
        videos.make(videos.causal(half, window=2), 2, job=Job(cache=far.cache))


@pytest.mark.parametrize("name", ["time_dim_concat", "reference_latents"])
def test_what_spans_the_whole_video_is_refused(plain, name):
    latent = torch.zeros(1, 16, 1, 8, 8)
    extra = {name: [latent] if name.endswith("s") else latent}
    with pytest.raises(FrugalError, match=f"the conditioning has {name.removesuffix('s')}"):
        videos.make(videos.causal(plain), 2, extra=extra)


def test_other_ways_to_see_time_are_refused(plain):
    stretched = videos.causal(plain)
    stretched.model_options["transformer_options"]["rope_options"] = {"scale_t": 2.0}
    with pytest.raises(FrugalError, match="time stretched by 2"):
        videos.make(stretched, 2)
    windows = videos.causal(plain)
    windows.model_options["context_handler"] = object()
    with pytest.raises(FrugalError, match="context windows"):
        videos.make(windows, 2)
    shifted = videos.causal(plain)
    shifted.model_options["transformer_options"]["rope_options"] = {"shift_t": 3.0}
    # A shift of all frames alike is no change to what they see of each other.
    assert videos.far(videos.make(shifted, 4), videos.make(videos.causal(plain), 4)) < 1e-5


@pytest.mark.parametrize(
    "part", [{"area": (2, 4, 4, 0, 0, 0), "strength": 1.0}, {"mask": torch.ones(1, 8, 8)}]
)
def test_a_prompt_for_a_part_of_the_picture_is_refused(plain, part):
    with pytest.raises(FrugalError, match="a positive prompt for a part of the picture"):
        videos.make(videos.causal(plain), 2, extra=part)


def test_a_step_cache_may_not_skip_the_clean_pass(plain):
    from comfy.patcher_extension import WrappersMP

    def skip(executor, x, t, *args, **kwargs):
        return torch.zeros_like(x) if float(t[0]) == 0 else executor(x, t, *args, **kwargs)

    model = videos.causal(plain)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", skip)
    with pytest.raises(FrugalError, match="remove the step cache"):
        videos.make(model, 4)


def test_with_the_constant_context_kept(plain):
    """Cross-attention's own cache serves all blocks of a run, and changes nothing."""
    from frugal.nodes.memory import cross_kv_run

    reports = []
    wanted = videos.make(videos.causal(plain, window=4), 6, cfg=3.0)
    kept = cross_kv_run.apply(plain, cross_kv_run.Options(), reports.append)[0]
    assert torch.equal(videos.make(videos.causal(kept, window=4), 6, cfg=3.0), wanted)
    assert (reports[0].computed, reports[0].reused) == (4, 4 * (8 - 1))


def test_two_prompts_on_one_side_are_refused(plain):
    import comfy.sample
    import comfy.samplers

    from frugal.nodes.causal.sampler_run import sample_causal

    two = [[videos.prompt_of(seed), {}] for seed in (5, 7)]
    start = torch.zeros(1, 16, 2, 8, 8)
    with pytest.raises(FrugalError, match="2 conditionings as positive"), torch.inference_mode():
        comfy.sample.sample_custom(
            videos.causal(plain), start, 1.0, comfy.samplers.KSAMPLER(sample_causal),
            videos.SIGMAS, two, two[:1], start, seed=1, disable_pbar=True,
        )  # fmt: skip


def test_schedules_of_a_causal_and_a_plain_run_do_not_mix(plain):
    """With dynamic VRAM ComfyUI puts buffers back by name after it exchanged a model's objects."""
    dynamic_vram.needed()
    causal, kept = videos.causal(plain, window=4), {}
    base = plain.get_model_object("model_sampling").sigmas.clone()
    shifted = causal.get_model_object("model_sampling").sigmas.clone()
    assert not torch.equal(base, shifted)
    for patcher, meant in ((plain, base), (causal, shifted)) * 2:
        patcher.unpatch_model(unpatch_weights=False)
        patcher.patch_model(load_weights=False)
        dynamic_vram.restore_buffers(patcher, kept)
        assert torch.equal(patcher.model.model_sampling.sigmas, meant)
    causal.unpatch_model(unpatch_weights=False)
    # And they are what ComfyUI's own shift node makes.
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    stock = ModelSamplingSD3().patch(plain, videos.SHIFT)[0].get_model_object("model_sampling")
    ours = causal.get_model_object("model_sampling")
    assert torch.equal(ours.sigmas, stock.sigmas) and ours.shift == stock.shift
    assert ours.sigma_max == stock.sigma_max and ours.sigma_min == stock.sigma_min
    ours = model_run.flow(plain, 3.0)
    ours.set_parameters(shift=videos.SHIFT, multiplier=1000)
    assert torch.equal(ours.sigmas, stock.sigmas)
