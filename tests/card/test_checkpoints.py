"""Every kind of checkpoint is loaded and sampled twice, with and without a LoRA."""

from __future__ import annotations

import pytest
import torch

from frugal.nodes.wan import load_run
from frugal.tests.card.bounds import EIGHT, EXACT, HALF, MERGED_FP8, MERGED_INT4  # fmt: skip
from frugal.tests.helpers import causal, gguf, lora
from frugal.tests.helpers import wan as bed

LAYOUTS = (
    "fp16", "bf16", "fp32", "e4m3 cast", "e4m3 scale_weight, no marker",
    "e4m3 weight_scale [rows,1], no marker (LightX2V)",
    "e4m3 scale_weight per row and 64 inputs, marker (musubi)",
    "e4m3 weight_scale_inv per square of 128",
)  # fmt: skip
ROWS = LAYOUTS[5]
PACKED = ("GPTQ 4 bits, act-order", "AWQ 4 bits")
GGUF = ("GGUF Q8_0", "GGUF Q4_K", "GGUF IQ4_XS")
TARGETS = ("fp8 per-channel", "int8 ConvRot", "W4A8")
MERGED = {
    "fp8 per-channel": MERGED_FP8, ROWS: MERGED_FP8, "int8 ConvRot": EIGHT, "W4A8": MERGED_INT4,
}  # fmt: skip


def packed(bench, label):
    if label not in GGUF:
        return bench.load(bed.gptq_or_awq(bench.source, **bed.PACKED_LAYOUTS[label]))
    path = bench.folder / "model.gguf"
    gguf.write(path, bench.source, label.removeprefix("GGUF "))
    with torch.inference_mode():
        return load_run.load_wan(path)[0]


@pytest.mark.parametrize("label", LAYOUTS)
def test_layout(bench, layouts, same_as_cpu, label):
    model = bench.load(layouts[label]())
    same_as_cpu([bench.sample(model), bench.sample(model)], HALF)


@pytest.mark.parametrize("label", [*PACKED, *GGUF])
def test_packed(bench, same_as_cpu, label):
    model = packed(bench, label)
    same_as_cpu([bench.sample(model), bench.sample(model)], HALF)


def test_w4a16(bench, same_as_cpu):
    same_as_cpu([bench.sample(bench.load(bed.w4a16(bench.source)))], HALF)


@pytest.mark.parametrize("products", ["as the node chooses", "full precision"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantised_on_load(bench, layouts, same_as_cpu, target, products):
    choices = ("default", target, *([products] if products == "full precision" else []))
    model = bench.load(layouts["bf16"](), *choices)
    exact = target == "fp8 per-channel" or products == "full precision"
    same_as_cpu([bench.sample(model), bench.sample(model)], HALF if exact else EIGHT)


@pytest.mark.parametrize("form", [*TARGETS, PACKED[0], GGUF[1], ROWS, "bf16"])
def test_merged_lora_is_the_same_in_both_runs(bench, layouts, same_as_cpu, form):
    """The first run merges it, later ones find it merged: resident or streamed, the same video."""
    if form in TARGETS:
        model = bench.load(layouts["bf16"](), "default", form)
    elif form in (*PACKED, *GGUF):
        model = packed(bench, form)
    else:
        model = bench.load(layouts[form]())
    plain = bench.sample(model)
    made = bench.stock_lora(model)
    runs = [bench.sample(made), bench.sample(made)]
    assert torch.equal(*runs), f"run 2 is off by {causal.far(runs[1], runs[0])}"
    assert not torch.equal(runs[0], plain)
    same_as_cpu([plain, *runs], MERGED.get(form, HALF))


@pytest.mark.parametrize("form", ["bf16", ROWS])
def test_lora_beside(bench, layouts, same_as_cpu, form):
    model = bench.load(layouts[form]())
    tensors, _ = lora.lora(lora.linears(), alpha=2)
    with torch.inference_mode():
        made, _ = lora.put(model, bench.folder, tensors, 0.8)
    same_as_cpu([bench.sample(made), bench.sample(made)], HALF)


def test_a_lora_leaves_the_model_alone(bench, layouts, same_as_cpu):
    """A model, its clone with a LoRA that changes modulation too, and the model again."""
    plain = bench.load(layouts["fp32"](), "fp32")
    tensors, _ = lora.lora(lora.linears()[:4])
    for block in range(2):
        name = f"diffusion_model.blocks.{block}.modulation.diff"
        tensors[name] = torch.full((1, 6, 256), 0.3)
    first = bench.sample(plain)
    with torch.inference_mode():
        changed, _ = lora.put(plain, bench.folder, tensors, 0.8)
    with_it, again, with_it_again = map(bench.sample, (changed, plain, changed))
    assert torch.equal(first, again) and torch.equal(with_it, with_it_again)
    assert not torch.equal(first, with_it)
    same_as_cpu([first, with_it], EXACT)
