"""Wan blocks in pieces: the same result up to rounding, and the memory that the plan says."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.wan.model
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch

from frugal.kernels.memory import chunks
from frugal.kernels.memory.plan import MemoryOptions
from frugal.kernels.memory.trace import trace
from frugal.nodes.memory import meta_models
from frugal.nodes.memory.chunked_blocks import ActiveOptions, forwards
from frugal.tests.helpers import rounding
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.memory import allocator_peak

CPU = torch.device("cpu")
SHAPE, LONGER = (3, 20, 20), (3, 40, 40)
TOKENS = 3 * 10 * 10
EVERY = [MemoryOptions(False, 2), MemoryOptions(False, 1, 2), MemoryOptions(False, 4, 4)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tiny sequences have few tiles of 256 rows."""
    monkeypatch.setattr(chunks, "ROWS", 32)


def patcher_of(config, dtype):
    weights = {name: value.to(dtype) for name, value in bed.weights(config).items()}
    found = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    found.model.manual_cast_dtype = None
    return found


def zeros(model, dtype, batch=1, shape=SHAPE):
    found = meta_models.inputs(model, batch, shape, dtype, CPU)()
    found["transformer_options"] = {
        "optimized_attention_override": lambda _, *a, **k: attention_pytorch(*a, **k)
    }
    return found


def arguments(model, dtype, batch=1):
    make = torch.Generator().manual_seed(5)
    found = zeros(model, dtype, batch)
    for name in ("x", "context", "clip_fea", "vace_context"):
        if name in found:
            found[name] = torch.randn(found[name].shape, generator=make).to(dtype)
    found["timestep"] = torch.full((batch,), 600.0)
    return found


def in_pieces_of(model) -> ActiveOptions:
    state = ActiveOptions.of(MemoryOptions())

    def module(path):
        return model.get_submodule(path.rpartition(".")[0])

    for path, forward in list(forwards(model, state, lambda path: module(path).forward)):
        module(path).forward = forward
    return state


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("config", "dtype", "batch"),
    [
        (bed.T2V, torch.float32, 1),
        (bed.I2V, torch.float32, 2),
        (bed.I2V, torch.bfloat16, 1),
        (bed.VACE, torch.float32, 1),
    ],
)
def test_the_same_up_to_rounding(config, dtype, batch):
    model = patcher_of(config, dtype).model.diffusion_model
    given = arguments(model, dtype, batch)
    limit = rounding.bound(dtype, rounding.terms(model, TOKENS, dtype))
    with torch.no_grad():
        whole = model(**given)
        state = in_pieces_of(model)
        for memory_options in EVERY:
            state.now = memory_options
            assert rounding.distance(model(**given), whole) <= limit, memory_options
            # The same kernels on the same shapes.
            assert torch.equal(model(**given), model(**given))
        # The pieces are at work: with another layer below them the result is another one.
        state.now = MemoryOptions(False, 2)
        model.blocks[0].ffn[2].weight.mul_(1.01 if dtype == torch.float32 else -1)
        assert rounding.distance(model(**given), whole) > limit


@pytest.mark.numeric
def test_patches_of_others_on_self_attention_still_get_everything():
    model = patcher_of(bed.T2V, torch.float32).model.diffusion_model
    seen = []
    given = arguments(model, torch.float32)

    def patch(args):
        seen.append(args["q"].shape[1])
        return args["x"]

    with torch.no_grad():
        whole = model(**given)
        state = in_pieces_of(model)
        state.now = MemoryOptions(False, 4, 4)
        given["transformer_options"]["patches"] = {"attn1_patch": [patch]}
        limit = rounding.bound(torch.float32, rounding.terms(model, TOKENS, torch.float32))
        assert rounding.distance(model(**given), whole) <= limit
    # Older versions have no such patches; where there are, they see all tokens.
    assert set(seen) <= {TOKENS}


@pytest.mark.counts_memory
@pytest.mark.parametrize("config", [bed.T2V, bed.I2V, bed.VACE], ids=["T2V", "I2V", "VACE"])
@pytest.mark.parametrize(
    "memory_options", [MemoryOptions(), MemoryOptions(False, 4, 4)], ids=["whole", "pieces"]
)
def test_predicted_memory_is_counted_memory(config, memory_options):
    patcher = patcher_of(config, torch.float32)
    model = patcher.model.diffusion_model
    predicted = meta_models.ForwardPeaks(patcher.model, CPU).of(1, LONGER, memory_options)
    state = in_pieces_of(model)
    state.now = memory_options
    decomposed, _ = meta_models.kernels(CPU)

    def call():
        return model(**zeros(model, torch.float32, shape=LONGER))

    counted = trace(call, decomposed=decomposed)
    assert predicted == pytest.approx(counted.peak, rel=0.02)
    assert predicted == pytest.approx(allocator_peak(call), rel=0.1)


def test_fused_kernels_of_a_card_need_less(monkeypatch):
    patcher = patcher_of(bed.T2V, torch.float32)
    patcher.model.manual_cast_dtype = torch.bfloat16
    here = meta_models.ForwardPeaks(patcher.model, CPU).trace(3, 1, LONGER, MemoryOptions())
    monkeypatch.setattr(meta_models.doctor_run, "eager_rotation", lambda _: None)
    card = meta_models.ForwardPeaks(patcher.model, torch.device("cuda")).trace(
        3, 1, LONGER, MemoryOptions()
    )
    assert card.phases["self_attn 1"] < here.phases["self_attn 1"]


def test_pieces_lower_the_prediction_and_layers_do_not_change_it():
    patcher = patcher_of(bed.I2V, torch.float32)
    peaks = meta_models.ForwardPeaks(patcher.model, CPU)
    most = [peaks.of(1, SHAPE, memory_options) for memory_options in (MemoryOptions(), *EVERY)]
    assert most[0] > most[1] > most[3] and most[0] > most[3]
    deep = peaks.trace(8, 1, SHAPE, MemoryOptions()).peak
    assert deep == most[0]


@pytest.mark.parametrize(
    "memory_options", [MemoryOptions(), MemoryOptions(False, 8), MemoryOptions(False, 8, 8)]
)
def test_the_peak_never_lies_in_norms_and_modulation(memory_options):
    """Which are left whole: in a 14B at 480p it is inside attention or feed-forward."""
    config = dict(
        image_model="wan2.1", model_type="i2v", dim=5120, ffn_dim=13824, num_heads=40,
        num_layers=3, in_dim=36, out_dim=16,
    )  # fmt: skip
    model = SimpleNamespace(
        model_config=SimpleNamespace(unet_config=config),
        manual_cast_dtype=torch.bfloat16,
        diffusion_model=comfy.ldm.wan.model.WanModel(
            **config, device="meta", operations=comfy.ops.disable_weight_init
        ),
    )
    found = meta_models.ForwardPeaks(model, CPU).trace(3, 1, (21, 60, 104), memory_options)
    parts = {name: size for name, size in found.phases.items() if not name.startswith("block")}
    assert len(parts) == 9 and max(parts.values()) == found.peak
