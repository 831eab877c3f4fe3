"""8-bit weights with one scale per output channel: round trips, rounding, rotation, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import per_channel
from frugal.kernels.formats.per_channel import FP8, INT8
from frugal.kernels.tryon import precision

pytestmark = pytest.mark.numeric


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shape", [(40, 64), (40, 24, 3, 3), (7, 640)])
@pytest.mark.parametrize("kind, limit", [(INT8, 1.1e-2), (FP8, 3.2e-2)])
def test_each_channel_has_its_own_scale(shape, kind, limit):
    weight = gaussian(*shape) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    q, s = per_channel.encode(weight, kind)
    assert q.shape == weight.shape and q.dtype == per_channel.TYPES[kind]
    assert s.shape == (shape[0], *[1] * (len(shape) - 1)) and s.dtype == torch.float32
    back = per_channel.decode(q, s, torch.float32)
    worst = max(relative(b, w) for b, w in zip(back, weight, strict=True))
    assert worst < limit
    step = weight.flatten(1).abs().amax(1) / per_channel.LARGEST[kind]
    assert torch.allclose(s.flatten(), step)
    # One scale for the whole cannot hold channels five decades apart.
    coarse = per_channel.decode(*per_channel.encode(weight, INT8, per_tensor=True), torch.float32)
    assert relative(coarse[0], weight[0]) > 0.5


@pytest.mark.parametrize("kind", [INT8, FP8])
def test_values_on_the_grid_come_back_exactly_even_when_rounded_stochastically(kind):
    q, s = per_channel.encode(gaussian(16, 64), kind)
    weight = per_channel.decode(q, s, torch.float32)
    for seed in (None, 3):
        again, scale = per_channel.encode(weight, kind, seed=seed)
        assert relative(per_channel.decode(again, scale, torch.float32), weight) < 1e-3
    assert torch.equal(per_channel.encode(weight, kind)[0].float(), q.float())


@pytest.mark.parametrize("kind", [INT8, FP8])
def test_stochastic_rounding_keeps_changes_below_half_a_step(kind):
    weight = torch.full((1, 20000), 0.3 if kind == INT8 else 0.3125)
    weight[0, 0] = 127.0 if kind == INT8 else 448.0
    weight[0, 1:] += 0.0 if kind == INT8 else 0.005
    nearest = per_channel.decode(*per_channel.encode(weight, kind), torch.float32)[0, 1:]
    assert nearest.unique().numel() == 1
    drawn = per_channel.decode(*per_channel.encode(weight, kind, seed=1), torch.float32)[0, 1:]
    assert drawn.unique().numel() == 2
    assert abs(float(drawn.mean() - weight[0, 1])) < 0.15 * abs(float(nearest[0] - weight[0, 1]))
    same = per_channel.encode(weight, kind, seed=1)[0]
    assert torch.equal(same.float(), per_channel.encode(weight, kind, seed=1)[0].float())
    assert not torch.equal(same.float(), per_channel.encode(weight, kind, seed=2)[0].float())


def test_stochastic_e4m3_gives_neighbours_only():
    values = torch.cat([gaussian(4000) * 40, gaussian(4000) * 0.01])
    weight = torch.cat([values, torch.tensor([448.0])])[None]
    q, s = per_channel.encode(weight, FP8, seed=5)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    got, scaled = q.float()[0], (weight / s)[0]
    above = torch.searchsorted(grid, scaled).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    assert bool(((got == low) | (got == high)).all())


def test_pieces_change_nothing(monkeypatch):
    weight = gaussian(50, 64)
    whole = per_channel.encode(weight, INT8, rotation=64)
    monkeypatch.setattr(per_channel, "PIECE", 64 * 7)
    parts = per_channel.encode(weight, INT8, rotation=64)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    # Weights of a module are parameters, which record gradients unless told otherwise.
    given = per_channel.encode(torch.nn.Parameter(weight), INT8, rotation=64)
    assert torch.equal(whole[0], given[0]) and torch.equal(whole[1], given[1])


def test_the_rotation_is_comfy_kitchens():
    kitchen = pytest.importorskip("comfy_kitchen.tensor").TensorWiseINT8Layout
    weight = gaussian(24, 320)
    weight[:, 5] *= 50  # an outlier input, which rotation spreads
    q, s = per_channel.encode(weight, INT8, rotation=64)
    data, _ = kitchen.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=64)
    assert int((q.int() - data.int()).abs().max()) <= 1
    assert float((q != data).float().mean()) < 1e-3
    theirs = kitchen.dequantize(
        q,
        kitchen.Params(
            scale=s,
            orig_dtype=torch.float32,
            orig_shape=(24, 320),
            convrot=True,
            convrot_groupsize=64,
        ),
    )
    ours = per_channel.decode(q, s, torch.float32, 64)
    assert relative(ours, theirs) < 1e-6
    plain = per_channel.decode(*per_channel.encode(weight, INT8), torch.float32)
    quiet = torch.arange(320) != 5
    assert relative(ours[:, quiet], weight[:, quiet]) < 0.5 * relative(
        plain[:, quiet], weight[:, quiet]
    )


def test_refusals():
    def refused(match, weight, **options):
        with pytest.raises(FrugalError, match=match):
            per_channel.encode(weight, INT8, **options)

    bad = gaussian(4, 64)
    bad[2, 3] = float("nan")
    refused("x: y holds a weight that is not finite", bad, where="x: y")
    refused("holds weights in float8_e4m3fn", gaussian(4, 4).to(torch.float8_e4m3fn))
    refused("rotated by 64", gaussian(4, 96), rotation=64)
    refused("rotation of 32 inputs", gaussian(4, 64), rotation=32)


SHAPES = {
    "input_blocks.0.0.weight": (320, 9, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.0.in_layers.2.bias": (320,),
    "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
    "input_blocks.1.1.transformer_blocks.0.norm1.weight": (320,),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "time_embed.0.weight": (1280, 320),
    "out.2.weight": (4, 1280, 3, 3),
}


def test_matrices_of_blocks_and_inner_3_by_3_convolutions_are_chosen():
    found = precision.plan(SHAPES, INT8)
    block = "input_blocks.1.1.transformer_blocks.0"
    assert found == {
        "input_blocks.1.0.in_layers.2": precision.Layer(INT8, 4),
        f"{block}.attn1.to_q": precision.Layer(INT8, 2, 64),
        f"{block}.ff.net.2": precision.Layer(INT8, 2, 64),
        "input_blocks.3.0.op": precision.Layer(INT8, 4),
    }
    assert all(layer.rotation == 0 for layer in precision.plan(SHAPES, FP8).values())
    with pytest.raises(FrugalError, match="W4A8"):
        precision.plan(SHAPES, "W4A8")


def small(kind=INT8):
    tensors = {
        "a.transformer_blocks.0.q.weight": gaussian(160, 128),
        "a.0.in_layers.2.weight": gaussian(64, 64, 3, 3),
        "a.0.in_layers.2.bias": gaussian(64),
    }
    layers = precision.plan({n: tuple(t.shape) for n, t in tensors.items()}, kind)
    assert len(layers) == 2
    return dict(precision.quantise(tensors, layers)), layers


@pytest.mark.parametrize("kind", [INT8, FP8])
def test_a_declaration_reads_back_as_what_was_written(kind):
    tensors, layers = small(kind)
    assert precision.declared(tensors, "x") == layers
    matrix = json.loads(bytes(tensors["a.transformer_blocks.0.q.comfy_quant"].tolist()))
    assert matrix["format"] == ("int8_tensorwise" if kind == INT8 else "float8_e4m3fn")
    scale = tensors["a.transformer_blocks.0.q.weight_scale"]
    assert scale.shape == ((160, 1) if kind == INT8 else ())
    assert tensors["a.0.in_layers.2.weight_scale"].shape == (64, 1, 1, 1)


def test_contradictions_in_a_file_are_refused():
    def refused(match, **changes):
        tensors, _ = small()
        for suffix, value in changes.items():
            tensors[f"a.0.in_layers.2.{suffix}"] = value
        tensors = {name: value for name, value in tensors.items() if value is not None}
        with pytest.raises(FrugalError, match=match):
            precision.declared(tensors, "x")

    def words(**entry):
        return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)

    refused("lacks its weight_scale", weight_scale=None)
    refused("scales torch.float32 of shape .2.", weight_scale=torch.ones(2))
    refused("scales torch.float16", weight_scale=torch.ones(64, 1, 1, 1).half())
    refused("declared frugal_conv_int8 and holds torch.float32", weight=gaussian(64, 64, 3, 3))
    tensors, _ = small(FP8)
    tensors["a.transformer_blocks.0.q.weight_scale"] = torch.ones(160, 1)
    with pytest.raises(FrugalError, match="scales torch"):
        precision.declared(tensors, "x")
    refused("quantised as 'nvfp4'", comfy_quant=words(format="nvfp4"))
    refused("the setting 'group_size'", comfy_quant=words(format="frugal_conv_int8", group_size=8))
    refused("int8 matrices alone", comfy_quant=words(format="frugal_conv_int8", convrot=True))
    refused("unreadable declaration", comfy_quant=words(form="x"))
    refused("unreadable declaration", comfy_quant=torch.tensor([1, 2], dtype=torch.uint8))
