"""GPTQ, AWQ and W4A16 words against an independent packer, and rounding to W4A16."""

from __future__ import annotations

import os

import pytest
import torch

from frugal.kernels.checkpoints.header import TensorInfo
from frugal.kernels.checkpoints.packed import check_packed, classify_packed
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import packed_int
from frugal.kernels.formats.packed_int import (
    W4A16,
    PackedSpec,
    PackedWeight,
    dequantise,
    requantise,
)
from frugal.tests.helpers import host_waits
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.packed import gptq_or_awq_layer, w4a16_layer

pytestmark = pytest.mark.numeric

V2 = {"checkpoint_format": "gptq_v2"}
SHAPES = [(64, 128), (24, 256), (256, 64)]


def weight(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def packed(tensors: bed.Weights, shape: tuple[int, int], stated=None) -> PackedWeight:
    """What a loader makes of the tensors of one layer."""
    facts = {suffix: TensorInfo(t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
    layout = classify_packed("x: q", shape, facts, stated or {})
    assert layout.packed is not None
    found = PackedWeight(
        tensors["qweight"], tensors["scales"], tensors["qzeros"], tensors.get("g_idx"),
        layout.packed,
    )  # fmt: skip
    check_packed("x: q", found, stated or {})
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", bed.PACKED_LAYOUTS)
def test_weights_are_what_the_words_say(label, shape, monkeypatch):
    options = bed.PACKED_LAYOUTS[label] | {"group": 32}
    tensors, meant = gptq_or_awq_layer(weight(*shape), **options)
    found = packed(tensors, shape, V2 if options.get("version") == 2 else None)
    whole = dequantise(found, torch.float32)
    assert whole.shape == shape and torch.equal(whole, meant)
    assert torch.equal(dequantise(found, torch.float16), meant.half())
    assert torch.equal(dequantise(found, torch.bfloat16), meant.bfloat16())
    monkeypatch.setattr(packed_int, "PIECE", 1)
    assert torch.equal(dequantise(found, torch.float32), meant)
    # The weight itself is near, so the packer of the test is no nonsense.
    assert bed.relative(meant, weight(*shape)) < (0.01 if options.get("bits") == 8 else 0.12)


def w4a16(tensors: bed.Weights, shape: tuple[int, int], group: int) -> PackedWeight:
    scales, zeros = tensors["weight_scale"], tensors["weight_zeros"]
    return PackedWeight(
        tensors["weight"], scales, zeros, None, PackedSpec(W4A16, 4, 0, *shape, group)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_w4a16_is_what_its_definition_says(shape, dtype, monkeypatch):
    tensors, meant = w4a16_layer(weight(*shape), 32, dtype)
    found = w4a16(tensors, shape, 32)
    check_packed("x: q", found, {})
    whole = dequantise(found, torch.float32)
    assert whole.shape == shape and whole.is_contiguous()
    torch.testing.assert_close(whole, meant, rtol=0, atol=2e-7 * float(meant.abs().max()))
    assert torch.equal(dequantise(found, torch.float16), whole.half())
    monkeypatch.setattr(packed_int, "PIECE", 1)
    assert torch.equal(dequantise(found, torch.float32), whole)
    assert bed.relative(meant, weight(*shape)) < 0.12


def test_w4a16_agrees_with_comfy_kitchen():
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    layout = getattr(tensor, "TensorCoreAWQW4A16Layout", None)
    if layout is None:
        pytest.skip("this comfy-kitchen has no such layout")
    tensors, _ = w4a16_layer(weight(64, 128), 32, torch.float32)
    scale, zeros = tensors["weight_scale"], tensors["weight_zeros"]
    params = layout.Params(
        scale=scale, zeros=zeros, orig_dtype=torch.float32, orig_shape=(64, 128), group_size=32
    )
    theirs = layout.dequantize(tensors["weight"], params)
    torch.testing.assert_close(dequantise(w4a16(tensors, (64, 128), 32), torch.float32), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_to_w4a16(dtype, monkeypatch):
    source = weight(64, 128)
    tensors, meant = w4a16_layer(source, 32, dtype)
    like = w4a16(tensors, (64, 128), 32)
    made = requantise(source, like)
    # The same rounding as the independent packer's, but where a value lies between two steps.
    assert (made.words != tensors["weight"]).float().mean() < 1e-3
    torch.testing.assert_close(made.scales, tensors["weight_scale"])
    torch.testing.assert_close(made.zeros, tensors["weight_zeros"])
    assert bed.relative(dequantise(made, torch.float32), meant) < 1e-2
    monkeypatch.setattr(packed_int, "PIECE", 1)
    assert torch.equal(requantise(source, like).words, made.words)
    # One value in all places has no range: the zero point carries it.
    flat = requantise(torch.full((64, 128), 0.5), like)
    assert bed.relative(dequantise(flat, torch.float32), torch.full((64, 128), 0.5)) < 1e-6


@pytest.mark.parametrize("label", [*bed.PACKED_LAYOUTS, W4A16])
def test_no_piece_of_a_layer_makes_the_host_wait(label, monkeypatch):
    shape = (64, 256)
    if label == W4A16:
        found = w4a16(w4a16_layer(weight(*shape))[0], shape, 64)
    else:
        options = bed.PACKED_LAYOUTS[label] | {"group": 32}
        stated = V2 if options.get("version") == 2 else None
        found = packed(gptq_or_awq_layer(weight(*shape), **options)[0], shape, stated)
    monkeypatch.setattr(packed_int, "PIECE", 1)
    with host_waits.counted() as seen:
        dequantise(found, torch.float16)
    assert not seen, seen
    if label == W4A16:
        with host_waits.counted() as seen:
            requantise(weight(*shape), found)
        assert not seen, seen


def test_zero_point_conventions_differ_by_one_step():
    tensors, meant = gptq_or_awq_layer(weight(64, 128), version=2, group=32)
    as_v1 = dequantise(packed(tensors, (64, 128)), torch.float32)
    steps = tensors["scales"].float()[tensors["g_idx"].long()].t()
    torch.testing.assert_close(as_v1, meant - steps)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's counters")
@pytest.mark.parametrize("bits", [4, 8])
def test_working_memory_is_bounded(bits, monkeypatch):
    """Beyond the result, unpacking a large layer takes pieces only."""
    rows, width = 4096, 4096
    make = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31 - 1, (width * bits // 32, rows), generator=make)
    zeros = torch.zeros(width // 128, rows * bits // 32, dtype=torch.int32)
    spec = packed_int.PackedSpec("gptq", bits, 1, rows, width, 128)
    held = PackedWeight(words.int(), torch.ones(width // 128, rows).half(), zeros, None, spec)
    monkeypatch.setattr(packed_int, "PIECE", 1 << 20)
    dequantise(held, torch.float16)
    grown, out = bed.peak_memory(lambda: dequantise(held, torch.float16))
    assert grown <= out.nbytes + 40e6


def awq():
    return gptq_or_awq_layer(weight(64, 128), kind="awq", group=32)[0]


def gptq(**options):
    return gptq_or_awq_layer(weight(64, 128), group=32, **options)[0]


def with_leaf(tensors, suffix, value):
    return tensors | {suffix: value}


# label -> (maker of tensors, settings, what the message must say)
REFUSED = {
    "stored 15": (
        lambda: with_leaf(gptq(), "qzeros", gptq()["qzeros"] | 0x70000000 | 0x0000000F),
        {},
        "zero points as 15, which readers of GPTQ version 1 take differently",
    ),
    "undecided version": (lambda: gptq(symmetric=True, version=2), {}, "in version 2 and not in"),
    "symmetric against the words": (gptq, {"sym": True}, "expected 7 for symmetric"),
    "version 2 symmetric against the words": (
        lambda: gptq(symmetric=True),
        V2 | {"sym": True},
        "expected 8 for symmetric",
    ),
    "other checkpoint format": (
        gptq,
        {"checkpoint_format": "marlin"},
        "checkpoint format 'marlin'",
    ),
    "other bits": (gptq, {"bits": 8}, "gptq with 4 bits, while the settings say"),
    "other method": (awq, {"quant_method": "gptq"}, "awq with 4 bits, while the settings say"),
    "g_idx out of range": (
        lambda: with_leaf(gptq(), "g_idx", torch.full((128,), 4, dtype=torch.int32)),
        {},
        "group numbers 4 to 4; expected 0 to 3",
    ),
    "g_idx of another width": (
        lambda: with_leaf(gptq(), "g_idx", torch.zeros(64, dtype=torch.int32)),
        {},
        r"g_idx of shape \[64\]",
    ),
    "AWQ with g_idx": (
        lambda: with_leaf(awq(), "g_idx", torch.zeros(128, dtype=torch.int32)),
        {},
        "g_idx",
    ),
    "scales that are not finite": (
        lambda: with_leaf(awq(), "scales", awq()["scales"] * float("inf")),
        {},
        "scales that are not finite",
    ),
    "scales turned round (GEMV)": (
        lambda: with_leaf(awq(), "scales", awq()["scales"].t().contiguous()),
        {},
        r"scales float16 \[64, 4\]",
    ),
    "three bits": (
        lambda: with_leaf(gptq(), "qweight", torch.zeros(12, 64, dtype=torch.int32)),
        {},
        r"words of shape \[12, 64\]",
    ),
    "words of another type": (
        lambda: with_leaf(gptq(), "qweight", gptq()["qweight"].long()),
        {},
        "words in int64",
    ),
    "no scales": (lambda: {k: v for k, v in gptq().items() if k != "scales"}, {}, "without scales"),
    "declared otherwise": (
        lambda: gptq() | {"comfy_quant": torch.zeros(2, dtype=torch.uint8)},
        {},
        "a comfy_quant beside",
    ),
    "groups that do not divide": (
        lambda: {
            "qweight": awq()["qweight"],
            "scales": awq()["scales"][:3],
            "qzeros": awq()["qzeros"][:3],
        },
        {},
        "3 groups of scales for width 128",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal(kind):
    make, stated, message = REFUSED[kind]
    with pytest.raises(FrugalError, match=message) as caught:
        packed(make(), (64, 128), stated)
    assert str(caught.value).isascii() and caught.value.do
