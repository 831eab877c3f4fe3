"""What the pack's nodes do to a run: causal video, caches, attention, experts, compiling."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.causal import session_file
from frugal.nodes.causal import video_run
from frugal.nodes.memory import cross_kv_run
from frugal.nodes.sampling import attention_run, compile_run, step_cache_run
from frugal.nodes.wan import experts_run
from frugal.tests.card.bounds import EIGHT, EXACT, HALF
from frugal.tests.helpers import causal as causal_bed
from frugal.tests.helpers import sampling
from frugal.tests.helpers import wan as bed

WAYS = [
    ("gathered", "model"), ("gathered", "fp8"), ("gathered", "int8"),
    ("chunked", "model"), ("chunked", "fp8"), ("chunked", "int8"), ("paged", "model"),
]  # fmt: skip


def silent(report) -> None:
    pass


@pytest.fixture
def plain(bench, layouts):
    return bench.load(layouts["fp32"](), "fp32")


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_causal(plain, same_as_cpu, way, kind, on_host):
    with torch.inference_mode():
        made = causal_bed.causal(
            plain, window=4, sink=1, way=way, kind=kind, on_host=on_host,
            relative=way != "paged",
        )  # fmt: skip
        same_as_cpu([causal_bed.make(made, 7, cfg=2.0)], EXACT if kind == "model" else EIGHT)


def test_causal_video_and_session(bench, plain, same_as_cpu):
    positive, negative = bench.prompts
    latent = {"samples": torch.zeros(1, 16, 4, 8, 8)}
    settings = video_run.Settings(3, 3, 2.0, "simple", 2, keep=True)
    with torch.inference_mode():
        bench.sample(plain)
        made = causal_bed.causal(plain, window=6, sink=1, relative=True)

        def video(*more):
            return video_run.make_video(made, positive, negative, latent, settings, *more)

        first, session, _ = video()
        path = bench.folder / "session.safetensors"
        session_file.save(session, path)
        kept = session_file.load(path, made.load_device)
        onward = video(kept, ((0.5, negative),))[0]
        other, again = video(session)[0], video()[0]
    assert torch.equal(first["samples"], again["samples"])
    same_as_cpu([each["samples"] for each in (first, onward, other)])


def test_causal_and_plain_keep_their_schedules(bench, plain, same_as_cpu):
    """Either runs after the other; each has its own noise schedule, every time."""
    before = plain.get_model_object("model_sampling").sigmas.clone()
    with torch.inference_mode():
        made = causal_bed.causal(plain, window=4, relative=True)
        causal = [causal_bed.make(made, 4)]
    after_causal = bench.sample(plain)
    with torch.inference_mode():
        causal.append(causal_bed.make(made, 4))
    again = bench.sample(plain)
    after = plain.get_model_object("model_sampling").sigmas
    assert torch.equal(before.cpu(), after.cpu())
    assert torch.equal(*causal) and torch.equal(after_causal, again)
    same_as_cpu([causal[0], again])


@pytest.mark.parametrize("fp8", [False, True], ids=["as computed", "fp8"])
def test_constant_context(bench, layouts, same_as_cpu, fp8):
    model = bench.load(layouts["bf16"]())
    made, _ = cross_kv_run.apply(model, cross_kv_run.Options(fp8=fp8), silent)
    same_as_cpu([bench.sample(made, 4), bench.sample(model, 4)], EIGHT if fp8 else HALF)


def test_step_cache(bench, plain, same_as_cpu):
    smooth = sampling.smooth(plain)
    made = step_cache_run.apply(smooth, step_cache_run.Options(0.3), silent)
    same_as_cpu([bench.sample(made, 10)])


def test_attention(bench, layouts, same_as_cpu):
    made = attention_run.apply(bench.load(layouts["bf16"]()))
    same_as_cpu([bench.sample(made, 3), bench.sample(made, 3)], HALF)


def test_two_experts(bench, layouts, same_as_cpu):
    high = bench.load(layouts["bf16"](), name="high")
    low = bench.load((bed.base(bed.weights(seed=2))[0], {}), name="low")
    pair, _ = experts_run.join(high, low, 0.875, 2.0)
    first = bench.sample(pair, 4)
    changed = bench.sample(bench.stock_lora(pair), 4)
    again = bench.sample(pair, 4)
    assert torch.equal(first, again)
    same_as_cpu([first, changed], HALF)


def test_compiled_eagerly(bench, layouts, same_as_cpu):
    made = compile_run.apply(bench.load(layouts["bf16"]()), backend="eager")
    same_as_cpu([bench.sample(made)], HALF)
