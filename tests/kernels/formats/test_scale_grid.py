"""Scales in a grid against blocks made one at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from frugal.kernels.formats import block_scales
from frugal.tests.helpers.blocks import fp8_runs, fp8_squares

pytestmark = pytest.mark.numeric

E4 = torch.float8_e4m3fn
# (out, in) with short squares at both edges.
SHAPES = ((256, 512), (200, 384), (300, 200))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", [partial(fp8_runs, run=8), fp8_squares], ids=["runs", "squares"])
def test_blocks_multiply_and_come_back(blocks, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    weight *= torch.linspace(0.1, 9, shape[1])
    stored, scale, exact = blocks(weight, E4)
    scale = scale.reshape(scale.shape[0], -1)
    assert block_scales.is_grid(tuple(scale.shape), shape)
    assert torch.equal(block_scales.dequantise(stored, scale, torch.float32), exact)
    again = block_scales.scale_like(weight, scale, torch.finfo(E4).max)
    assert torch.equal(again, scale)
    assert torch.equal(block_scales.divide(weight, again, E4).to(E4).float(), stored.float())


def test_shapes_that_are_no_grid():
    for scale in ((), (1,), (256,), (256, 1), (1, 1), (256, 3), (256, 512), (3, 4), (2, 3), (2,)):
        assert not block_scales.is_grid(scale, (256, 512)), scale


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.full((6, 1), 0.5), torch.full((1, 1), 0.5)]
)
def test_scalars_and_rows_are_products(scale):
    stored = torch.arange(24.0).reshape(6, 4).to(E4)
    assert torch.equal(block_scales.dequantise(stored, scale, torch.float32), stored.float() * 0.5)
    made = block_scales.scale_like(stored.float(), scale, 448.0)
    assert made.shape == scale.shape and bool((made > 0).all())
