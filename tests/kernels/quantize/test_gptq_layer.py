"""Symmetric INT4 in GPTQ's packing: the bits against a reader written out here, and the solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize import gptq_layer
from frugal.kernels.quantize.calibration import statistics_of
from frugal.tests.helpers.quantize import layer, output_error

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def bed():
    return layer(21, out=64, inside=256, seen=1024, held_out=512)


def unpacked(made: dict[str, torch.Tensor], group: int) -> np.ndarray:
    """The weight [out, in] as the format's definition reads it, value by value."""
    words = made["qweight"].numpy().view(np.uint32)
    zeros = made["qzeros"].numpy().view(np.uint32)
    scales = made["scales"].numpy().astype(np.float32)
    inside, out = 8 * words.shape[0], words.shape[1]
    weight = np.empty((out, inside), np.float32)
    for k in range(inside):
        g = k // group
        q = (words[k // 8] >> np.uint32(4 * (k % 8))) & 15
        n = np.arange(out)
        z = ((zeros[g, n // 8] >> (4 * (n % 8)).astype(np.uint32)) & 15) + 1
        weight[:, k] = (q.astype(np.float32) - z.astype(np.float32)) * scales[g]
    return weight


@pytest.mark.parametrize("group", gptq_layer.GROUPS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_words_say_what_was_chosen(bed, group, calibrated):
    known = statistics_of("layer", bed.seen) if calibrated else None
    made = gptq_layer.encode(bed.weight, group, "cpu", known)
    shape = tuple(bed.weight.shape)
    assert {
        suffix: (t.dtype, tuple(t.shape)) for suffix, t in made.items()
    } == gptq_layer.tensor_specs(shape, group)
    assert np.array_equal(gptq_layer.decode(made, shape, group).numpy(), unpacked(made, group))
    # Symmetric: all zero points in the middle.
    assert set(made["qzeros"].unique().tolist()) == {0x77777777}
    # A server that computes in bfloat16 reads the scales without rounding them.
    assert torch.equal(made["scales"].bfloat16().float(), made["scales"].float())


@pytest.mark.parametrize("group", gptq_layer.GROUPS)
def test_the_solver_keeps_the_output(bed, group):
    shape = tuple(bed.weight.shape)
    plain, solved = (
        gptq_layer.decode(gptq_layer.encode(bed.weight, group, "cpu", known), shape, group)
        for known in (None, statistics_of("layer", bed.seen))
    )
    errors = [output_error(bed.weight, each, bed.held_out) for each in (plain, solved)]
    assert errors[1] < 0.6 * errors[0]
    assert float((plain - bed.weight).norm() / bed.weight.norm()) < 0.15


def test_values_on_the_grid_stay():
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(1))
    # Every group reaches the lower end, so that its scale is known.
    codes[:, ::32] = 0
    scale = 2.0 ** torch.randint(-9, -4, (32, 2), generator=torch.Generator().manual_seed(2))
    weight = (codes - 8.0) * scale.repeat_interleave(32, 1)
    made = gptq_layer.encode(weight, 32, "cpu")
    assert torch.equal(gptq_layer.decode(made, (32, 64), 32), weight)
    zeros = torch.zeros(32, 64)
    made = gptq_layer.encode(zeros, 32, "cpu")
    assert torch.equal(gptq_layer.decode(made, (32, 64), 32), zeros)


def test_what_cannot_be_held_is_refused(bed):
    with pytest.raises(FrugalError, match="no multiple of 128"):
        gptq_layer.encode(torch.zeros(32, 64), 128, "cpu")
    with pytest.raises(FrugalError, match="no multiple of 32"):
        gptq_layer.encode(torch.zeros(40, 64), 32, "cpu")
    with pytest.raises(FrugalError, match="not one of"):
        gptq_layer.encode(torch.zeros(32, 64), 16, "cpu")
    with pytest.raises(FrugalError, match="not finite"):
        gptq_layer.encode(torch.full((32, 64), torch.nan), 32, "cpu")
    with pytest.raises(FrugalError, match="float16"):
        gptq_layer.encode(torch.full((32, 64), 1e9), 32, "cpu")
    broken = bed.weight.clone()
    broken[3, 3] = torch.inf
    with pytest.raises(FrugalError, match="not finite"):
        gptq_layer.encode(broken, 32, "cpu", statistics_of("layer", bed.seen))
