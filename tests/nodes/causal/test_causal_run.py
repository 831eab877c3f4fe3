"""A video made block by block with a cache equals forwards of all frames at once in which attention
is cut to what each block may see.
"""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.causal.strategies import CHUNKED, PAGED
from frugal.nodes.causal.sampler_run import Job
from frugal.tests.helpers import causal as videos

pytestmark = pytest.mark.numeric

CLOSE = 1e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return videos.load(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The same weights, in a model that nothing of the pack touches."""
    return videos.stock(videos.load(tmp_path_factory.mktemp("stock")))


@pytest.mark.parametrize(
    ("window", "sink", "relative", "block", "cfg"),
    [
        (0, 0, False, 2, 1.0),
        (0, 0, True, 2, 3.0),
        (4, 0, False, 2, 3.0),
        (4, 1, False, 2, 1.0),
        (4, 1, True, 2, 3.0),
        (3, 2, True, 1, 1.0),
        (3, 0, False, 3, 1.0),
    ],
)
def test_equals_the_masked_forward(plain, network, window, sink, relative, block, cfg):
    options = dict(window=window, sink=sink, relative=relative)
    wanted = videos.Reference(network, **options).make(8, block, cfg=cfg)
    made = videos.make(videos.causal(plain, **options), 8, block, cfg=cfg)
    assert videos.far(made, wanted) < CLOSE
    if window:
        whole = videos.Reference(network).make(8, block, cfg=cfg)
        assert videos.far(made, whole) > 1e-4


def test_runs_of_pages_merged_equal_the_masked_forward(plain, network):
    options = dict(window=4, sink=1, relative=True)
    wanted = videos.Reference(network, **options).make(8)
    made = videos.make(videos.causal(plain, way=CHUNKED, **options), 8)
    assert videos.far(made, wanted) < CLOSE


def test_paged_attention_equals_the_masked_forward(plain, network, monkeypatch):
    from frugal.kernels.causal import paged_attention, paged_kernels
    from frugal.nodes.causal.sampler_run import text

    model, job = videos.causal(plain, window=4, sink=1, way=PAGED), Job(keep=True)
    # On the CPU it is not taken, and says so.
    gathered = videos.make(model, 6, cfg=3.0, job=job)
    assert "no compiled kernel for cpu" in text(job)
    monkeypatch.setattr(paged_attention, "choose", lambda *_: (paged_kernels.FLEX, ""))
    monkeypatch.setattr(paged_kernels, "BACKEND", "")
    job = Job(keep=True)
    made = videos.make(model, 6, cfg=3.0, job=job)
    wanted = videos.Reference(network, window=4, sink=1).make(6, cfg=3.0)
    assert videos.far(made, wanted) < CLOSE and videos.far(gathered, wanted) < CLOSE
    # Two blocks that see others, three calls of two layers each.
    assert "paged by flex_attention: 12 calls" in text(job)


def test_a_batch_is_its_samples(plain, network):
    wanted = videos.Reference(network, window=4).make(6, cfg=3.0, batch=2)
    made = videos.make(videos.causal(plain, window=4), 6, cfg=3.0, batch=2)
    assert videos.far(made, wanted) < CLOSE


@pytest.mark.parametrize("block", [1, 2])
def test_equals_comfyuis_own_causal_model(plain, tmp_path, block):
    pytest.importorskip("comfy.ldm.wan.ar_model", reason="this ComfyUI has no causal Wan")
    import json

    import comfy.samplers

    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    native = videos.load(tmp_path, metadata=metadata)
    assert type(native.model.diffusion_model).__name__ == "CausalWanModel"
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": block})
    with torch.inference_mode():
        wanted = videos.comfy.sample.sample_custom(
            native, videos.noise(6), 1.0, sampler, videos.SIGMAS,
            [[videos.prompt_of(5), {}]], [[videos.prompt_of(6), {}]],
            torch.zeros(1, 16, 6, videos.SIDE, videos.SIDE), seed=videos.SEED, disable_pbar=True,
        )  # fmt: skip
    wanted = native.model.process_latent_in(wanted)
    for model in (plain, native):
        made = videos.make(videos.causal(model), 6, block)
        assert videos.far(made, wanted) < CLOSE


def test_two_runs_are_one_run(plain):
    model = videos.causal(plain, window=4, sink=1, relative=True)
    whole = videos.make(model, 8)
    job = Job(keep=True)
    parts = [videos.make(model, 4, job=job)]
    parts.append(videos.make(model, 4, job=Job(cache=job.cache.fork()), first=4))
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert not torch.equal(videos.make(model, 4, first=4), parts[1])


def test_branches_are_separate_runs_and_share_their_past(plain):
    model = videos.causal(plain)
    job = Job(keep=True)
    videos.make(model, 4, job=job)
    pool = job.cache.pool
    shared = pool.used_bytes
    made = []
    for prompt in (5, 7, 8):
        branch = Job(cache=job.cache.fork(), keep=True)
        made.append((branch, videos.make(model, 2, job=branch, first=4, prompt=prompt)))
    assert pool.used_bytes == shared + 3 * shared // 2
    for (_, latent), prompt in zip(made, (5, 7, 8), strict=True):
        alone = Job(keep=True)
        videos.make(model, 4, job=alone)
        wanted = videos.make(model, 2, job=Job(cache=alone.cache), first=4, prompt=prompt)
        assert torch.equal(latent, wanted)
    assert videos.far(made[0][1], made[1][1]) > 1e-4


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("relative", [False, True])
def test_another_prompt_with_the_past_recomputed(plain, network, window, relative):
    options = dict(window=window, sink=1 if window else 0, relative=relative)
    model, reference = videos.causal(plain, **options), videos.Reference(network, **options)
    job = Job(keep=True)
    videos.make(model, 6, job=job, cfg=3.0)
    without = videos.make(model, 4, job=Job(cache=job.cache.fork()), first=6, prompt=7, cfg=3.0)
    again = Job(cache=job.cache, recache=True)
    made = videos.make(model, 4, job=again, first=6, prompt=7, cfg=3.0)
    reference.make(6, cfg=3.0)
    # What is kept is what the last block saw: the cache forgets when the next block begins.
    reference.forget_the_unseen(4, 2)
    wanted = reference.make(4, first=6, prompt=7, cfg=3.0)
    assert videos.far(made, wanted) < CLOSE
    assert videos.far(made, without) > 1e-4


def test_a_given_start_equals_frames_that_were_made(plain):
    model = videos.causal(plain)
    job = Job(keep=True)
    videos.make(model, 2, job=job)
    given = Job(prefix=torch.cat(list(job.cache.clean.values()), dim=2), keep=True)
    # Fresh noise goes by the number of blocks made, so the given start counts as none.
    job.cache.blocks_made = 0
    wanted = videos.make(model, 4, job=job, first=2)
    assert torch.equal(videos.make(model, 4, job=given, first=2), wanted)
    assert [each.frame for each in given.cache.kept] == list(range(6))


@pytest.mark.parametrize(("kind", "worst"), [("fp8", 0.03), ("int8", 0.02)])
def test_eight_bit_pages_are_near_and_say_how_near(plain, kind, worst):
    from frugal.nodes.causal.sampler_run import text

    exact = videos.make(videos.causal(plain, window=4), 8)
    job = Job(keep=True)
    made = videos.make(videos.causal(plain, window=4, kind=kind), 8, job=job)
    error = float((made - exact).norm() / exact.norm())
    assert 1e-5 < error < worst
    assert 1e-4 < job.cache.error < 0.05
    assert f"{job.cache.error:.2%}" in text(job)
    assert job.cache.pool.used_bytes < 0.3 * 4 * 2 * 2 * 16 * 256 * 4


def test_pages_in_main_memory_change_nothing(plain):
    options = dict(window=4, sink=1)
    wanted = videos.make(videos.causal(plain, **options), 8)
    assert torch.equal(videos.make(videos.causal(plain, on_host=True, **options), 8), wanted)


def test_calls_and_bytes(plain):
    job, sizes = Job(keep=True), []
    model = videos.causal(plain, window=4, sink=1)
    videos.make(
        model, 12, job=job, cfg=3.0, callback=lambda *_: sizes.append(job.cache.pool.used_bytes)
    )
    page = 2 * 16 * 256 * 4
    # 2 conditions, 2 layers; every block adds 2 frames until window and sink are full, then the
    # cache holds what the next block sees: one sink and the window without the block itself.
    assert sizes == [2 * 2 * n * page for n in (0, 0, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3)]
    assert job.cache.pool.peak_bytes == 2 * 2 * 5 * page
    assert job.calls == 6 * (2 + 1)
    last = Job()
    videos.make(model, 4, job=last)
    assert last.calls == 2 * 2 + 1
