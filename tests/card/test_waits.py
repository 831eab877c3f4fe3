"""How often the pack makes the host wait for the device: in each step, and in each layer of it.

Counted as differences, so that what happens once in a run, or in a load, is not in them: one step
more, and one layer more.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from frugal.kernels.checkpoints.wan_shapes import WanConfig
from frugal.nodes.memory import cross_kv_run
from frugal.nodes.sampling import attention_run, guidance_range_run, step_cache_run
from frugal.nodes.wan import load_run
from frugal.tests.card import modes
from frugal.tests.helpers import causal as causal_bed
from frugal.tests.helpers import gguf as gguf_bed
from frugal.tests.helpers import lora
from frugal.tests.helpers import wan as bed

if not modes.ON_CARD:
    pytest.skip("the CPU never waits for itself", allow_module_level=True)

from frugal.tests.card.simulated_cuda import waits

ROWS = "e4m3 weight_scale [rows,1], no marker (LightX2V)"
MUSUBI = "e4m3 scale_weight per row and 64 inputs, marker (musubi)"


def layout(label, *choices, apply=lambda bench, model: model):
    def make(bench, source, config):
        return apply(bench, bench.load(bed.fp8_layouts(source, config)[label](), *choices))

    return make


def packed(label):
    def make(bench, source, config):
        return bench.load(bed.gptq_or_awq(source, config, **bed.PACKED_LAYOUTS[label]))

    return make


def gguf(kind):
    def make(bench, source, config):
        path = bench.folder / "model.gguf"
        gguf_bed.write(path, source, kind, config)
        with torch.inference_mode():
            return load_run.load_wan(path)[0]

    return make


def constant_context(bench, model):
    return cross_kv_run.apply(model, cross_kv_run.Options(), lambda report: None)[0]


def step_cache(bench, model):
    # Compares every step, and skips none.
    options = step_cache_run.Options(1e-9, 0.0, 1.0)
    return step_cache_run.apply(model, options, lambda report: None)


def lora_beside(bench, model):
    layers = [f"blocks.{i}.ffn.0" for i in range(len(model.model.diffusion_model.blocks))]
    tensors, _ = lora.lora(layers)
    with torch.inference_mode():
        return lora.put(model, bench.folder, tensors)[0]


def causal(**options):
    def make(bench, source, config):
        model = layout("fp32", "fp32")(bench, source, config)
        with torch.inference_mode():
            return causal_bed.causal(model, window=4, sink=1, relative=True, **options)

    return make


# name: (maker of the model, waits per step, waits per layer of a step)
SCENARIOS = {
    "unquantised": (layout("bf16"), 0, 0),
    "fp8 by rows": (layout(ROWS), 0, 0),
    "fp8 by rows and runs": (layout(MUSUBI), 0, 0),
    "fp8 per-channel, on load": (layout("bf16", "default", "fp8 per-channel"), 0, 0),
    "int8 ConvRot, on load": (layout("bf16", "default", "int8 ConvRot"), 0, 0),
    "W4A8, on load": (layout("bf16", "default", "W4A8"), 0, 0),
    "GPTQ, act-order": (packed("GPTQ 4 bits, act-order"), 0, 0),
    "AWQ": (packed("AWQ 4 bits"), 0, 0),
    "GGUF Q4_K": (gguf("Q4_K"), 0, 0),
    "GGUF IQ4_XS": (gguf("IQ4_XS"), 0, 0),
    "unmerged LoRA": (layout(ROWS, apply=lora_beside), 0, 0),
    "attention chosen": (layout("bf16", apply=lambda bench, m: attention_run.apply(m)), 1, 0),
    "cross-attention cache": (layout("bf16", apply=constant_context), 1, 0),
    "step cache": (layout("bf16", apply=step_cache), 2, 0),
    "guided for a part": (
        layout("bf16", apply=lambda bench, m: guidance_range_run.apply(m, 0.0, 0.9)), 1, 0,
    ),
    "causal, pages as computed": (causal(way="gathered", kind="model"), 0, 0),
    "causal, int8 pages": (causal(way="gathered", kind="int8"), 0, 0),
    "causal, fp8 pages merged": (causal(way="chunked", kind="fp8"), 0, 0),
    "causal, pages in main memory": (causal(way="gathered", kind="model", on_host=True), 0, 0),
}  # fmt: skip


def counted(bench, name, model, steps) -> Counter:
    """Waits in the pack of a run that is not the model's first."""
    if name.startswith("causal"):
        sigmas = torch.linspace(1, 0, steps + 1)

        def run():
            causal_bed.make(model, 4, cfg=2.0, sigmas=sigmas)
    else:

        def run():
            bench.sample(model, steps)

    run()
    with waits.watch() as seen:
        run()
    # The older patcher streams weights from memory that is not pinned: these copies are ComfyUI's.
    streams = modes.MODE is not None and modes.MODE.streamed
    pageable = "from pageable host"
    return Counter(
        {w: n for w, n in seen.items() if w.place and not (streams and w.what.endswith(pageable))}
    )


def difference(more: Counter, less: Counter) -> Counter:
    found = more.copy()
    found.subtract(less)
    return Counter({wait: n for wait, n in found.items() if n})


@pytest.mark.parametrize("name", SCENARIOS)
def test_budget(bench, name):
    make, per_step, per_layer = SCENARIOS[name]
    steps = []
    for layers in (1, 2):
        config = WanConfig(dim=256, ffn_dim=512, layers=layers, in_dim=16, out_dim=16)
        model = make(bench, bed.weights(config), config)
        steps.append(difference(counted(bench, name, model, 3), counted(bench, name, model, 2)))
    layer = difference(steps[1], steps[0])
    step = difference(steps[0], layer)
    assert layer.total() <= per_layer, f"per layer: {dict(layer)}"
    assert step.total() <= per_step, f"per step: {dict(step)}"
