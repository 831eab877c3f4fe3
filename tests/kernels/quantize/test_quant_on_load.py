"""Quantising while loading: which layers, the same numbers as the whole weight, bounded memory."""

from __future__ import annotations

import os

import pytest
import torch

from frugal.kernels.checkpoints.layouts import LayerLayout
from frugal.kernels.checkpoints.normalise import declaration, normalise
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, per_channel
from frugal.kernels.quantize import on_load
from frugal.kernels.quantize.on_load import FP8, INT8_CONVROT, TARGETS, W4A8_NAME, quantised_plan
from frugal.tests.helpers import rounding
from frugal.tests.helpers import wan as bed

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
SMALL = bed.variant(bed.I2V, dim=64, ffn_dim=128, layers=1, text_dim=64, vace_layers=0)


def planned(folder, target, tensors=None, config=SMALL):
    held = bed.base(bed.weights(config))[0] if tensors is None else tensors
    source = open_source(bed.write(folder / "wan.safetensors", held))
    config_text = {"config": '{"transformer": {"text_dim": 64}}'}
    plan = plan_wan(source.name, source.tensors, config_text, source.value)
    return held, quantised_plan(plan, target, source.tensors)


def decoded(made: dict[str, torch.Tensor], layout: LayerLayout) -> torch.Tensor:
    """Float32 weight by comfy-kitchen's own decoders, or the definition of fp8 rows."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    weight = made["weight"]
    if layout.format == "float8_e4m3fn":
        return weight.float() * made["weight_scale"]
    common = {"orig_dtype": torch.float32}
    if layout.format == "int8_tensorwise":
        form = kitchen.TensorWiseINT8Layout
        params = form.Params(
            scale=made["weight_scale"], orig_shape=tuple(weight.shape), **layout.options, **common
        )
    else:
        form = kitchen.AsymW4A8Int8Layout
        params = form.Params(
            scale=made["weight_s_rel"],
            s_channel=made["weight_s_channel"],
            codebook=made.get("weight_codebook"),
            orig_shape=(weight.shape[0], 2 * weight.shape[1]),
            **layout.options,
            **common,
        )
    return form.dequantize(weight, params)


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_large_layers_change(target, tmp_path):
    held, plan = planned(tmp_path, target)
    inside = [f"blocks.0.{part}" for part in ("ffn.0", "ffn.2")]
    for attention, projections in {"self_attn": "qkvo", "cross_attn": "qkvo"}.items():
        inside += [f"blocks.0.{attention}.{suffix}" for suffix in projections]
    inside += ["blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img"]
    assert sorted(plan.layers) == sorted(inside)
    steps = []
    out = normalise(plan, held, on_load.quantiser("f", CPU, lambda: steps.append(1)))
    assert len(steps) == len(inside)
    for name, tensor in held.items():
        layer = name.removesuffix(".weight")
        if layer not in inside:
            assert torch.equal(out[name], tensor), name
            continue
        parts = {
            key[len(layer) + 1 :]: value
            for key, value in out.items()
            if key.startswith(f"{layer}.") and not key.endswith("bias")
        }
        bound = {FP8: 0.03, INT8_CONVROT: 0.02, W4A8_NAME: 0.1}[target]
        assert bed.relative(decoded(parts, plan.layers[layer]), tensor) < bound
    weights = sum(tensor.nbytes for name, tensor in out.items() if name.endswith(".weight"))
    others = sum(tensor.nbytes for name, tensor in out.items() if name in held) - weights
    assert sum(plan.formats.values()) == weights + others
    assert plan.notes[-1] == f"{len(inside)} layers are quantised to {target} while loading"


def test_fp8_rows_by_definition(tmp_path):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[3] = 0
    layout = LayerLayout("float8_e4m3fn", grid="row", computed=True)
    made = on_load.quantiser("f", CPU)(weight, layout)
    stored, scale, _ = bed.fp8(weight.float(), torch.float8_e4m3fn, rows=True)
    stored[3] = 0
    assert torch.equal(made["weight"].float(), stored.float())
    assert torch.equal(made["weight_scale"], scale.clamp(min=1e-30))


@pytest.mark.parametrize("target", TARGETS)
def test_pieces_give_what_the_whole_gives(target, tmp_path, monkeypatch):
    _, plan = planned(tmp_path, target)
    layout = plan.layers["blocks.0.ffn.2"]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    whole = on_load.quantiser("f", CPU)(weight, layout)
    for module in (codec, per_channel):
        monkeypatch.setattr(module, "PIECE", 300)
    parts = on_load.quantiser("f", CPU)(weight, layout)
    if target != W4A8_NAME:
        for suffix, tensor in parts.items():
            assert torch.equal(tensor.float(), whole[suffix].float()), suffix
        return
    # comfy-kitchen rotates by a matrix product: scales agree within its rounding, and a value that
    # lies between two codes may take the other one.
    bound = rounding.bound(torch.float32, layout.options["convrot_groupsize"])
    worst = (parts["weight_s_channel"] / whole["weight_s_channel"] - 1).abs().max()
    assert float(worst) <= bound
    one, other = (decoded(made, layout) for made in (whole, parts))
    assert float((one - other).norm()) < 0.05 * float((one - weight).norm())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's counters")
@pytest.mark.parametrize("target", TARGETS)
def test_memory_for_a_large_layer_is_bounded(target, tmp_path, monkeypatch):
    """fp8 and int8 take one piece beyond their result, W4A8 a float32 copy and its own pieces."""
    _, plan = planned(tmp_path, target)
    layout = plan.layers["blocks.0.ffn.2"]
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    for module in (codec, per_channel):
        monkeypatch.setattr(module, "PIECE", 1 << 20)
    quantise = on_load.quantiser("f", CPU)
    quantise(weight[:64], layout)
    grown, made = bed.peak_memory(lambda: quantise(weight, layout))
    result = sum(tensor.nbytes for tensor in made.values())
    copy = 4 * weight.numel() + 600e6 if target == W4A8_NAME else 0
    assert grown <= result + copy + 40e6


def test_weight_that_is_not_finite(tmp_path):
    layout = LayerLayout("float8_e4m3fn", grid="row", computed=True)
    weight = torch.ones(4, 16)
    weight[2, 3] = float("nan")
    with pytest.raises(FrugalError, match="wan holds a weight that is not finite"):
        on_load.quantiser("wan", CPU)(weight, layout)


def test_quantised_file_is_refused(tmp_path):
    tensors = bed.scaled(bed.weights(SMALL), bed.E4, config=SMALL)[0]
    with pytest.raises(FrugalError, match="already holds 12 layers in float8_e4m3fn"):
        planned(tmp_path, FP8, tensors)


def test_width_that_does_not_suit(tmp_path):
    odd = bed.variant(SMALL, ffn_dim=72)
    for target in (INT8_CONVROT, W4A8_NAME):
        with pytest.raises(FrugalError, match=r"ffn.2 has 72 inputs; expected a multiple of 16"):
            planned(tmp_path, target, config=odd)
    planned(tmp_path, FP8, config=odd)


def test_format_that_this_comfyui_lacks(tmp_path):
    _, plan = planned(tmp_path, INT8_CONVROT)
    with pytest.raises(FrugalError, match="to int8_tensorwise, unknown to this ComfyUI"):
        declaration(plan, ["float8_e4m3fn"])
