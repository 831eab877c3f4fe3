"""Tensors of public files that no layer needs: labels, counters, scales for activations; and other
words for fp8 grids. What is left out is named; what a computation could need is still refused.
"""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.checkpoints.layouts import BLOCK, ROW
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.blocks import fp8_squares

SOURCE = bed.weights()
LAYERS = bed.block_linears(SOURCE)


def plan_of(folder, tensors, metadata=None):
    path = bed.write(folder / "wan.safetensors", tensors, metadata)
    source = open_source(path)
    return plan_wan(source.name, source.tensors, source.metadata, source.value)


LABELS = {
    "model_type.SkyReels-V2-T2V-14B-540P": torch.zeros(1),
    "model_type.Wan2_1-FLF2V-14B-720P": torch.zeros(()),
    "global_step": torch.tensor(3),
    "epoch": torch.zeros(0),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_labels_are_named_and_not_used(prefix, tmp_path):
    held = {prefix + name: tensor for name, tensor in SOURCE.items()}
    plan = plan_of(tmp_path, held | LABELS)
    assert set(plan.rename) == set(held)
    (note,) = [note for note in plan.notes if "are labels" in note]
    assert note.startswith("4 tensors are labels") and all(name in note for name in LABELS)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("blocks.0.model_type", torch.zeros(1)),
        ("logit_scale", torch.zeros(1)),
        ("blocks.0.self_attn.q.output_scale", torch.ones(1)),
        ("model_type.wan", torch.zeros(2)),
        ("face_adapter.count", torch.zeros(1)),
        ("head.step", torch.zeros(1)),
    ],
)
def test_what_may_be_part_of_a_model_is_refused(name, tensor, tmp_path):
    with pytest.raises(FrugalError, match="holds"):
        plan_of(tmp_path, SOURCE | {name: tensor})


@pytest.mark.parametrize("suffix", ["input_scale", "scale_input"])
@pytest.mark.parametrize("form", ["int8_tensorwise", "none declared"])
@pytest.mark.parametrize("value", [1.0, 0.02])
def test_activation_scale_of_int8(form, suffix, value, tmp_path):
    held = bed.int8_rows(SOURCE, declared=form != "none declared")[0]
    held |= {f"{layer}.{suffix}": torch.tensor(value) for layer in LAYERS}
    plan = plan_of(tmp_path, held)
    assert not any(suffix in raw for raw in plan.rename)
    assert any(
        note.startswith(f"{len(LAYERS)} tensors {suffix} are not used") for note in plan.notes
    )


@pytest.mark.parametrize("shape", ["rows", "width"])
def test_activation_scales_of_ones(shape, tmp_path):
    def ones(layer, scale):
        rows, width = SOURCE[f"{layer}.weight"].shape
        return {f"{layer}.scale_input": torch.ones((rows, 1) if shape == "rows" else (width,))}

    held = bed.scaled(SOURCE, bed.E4, rows=True, extras=ones)[0]
    assert plan_of(tmp_path, held).layers[LAYERS[0]].grid == ROW
    held[f"{LAYERS[3]}.scale_input"] *= 2
    with pytest.raises(FrugalError, match="that are not 1; expected one number, or ones"):
        plan_of(tmp_path, held)


def gridded(form, squares, **options):
    def declared(layer, scale):
        return bed.declare(layer, format=form, **options)

    return bed.scaled(
        SOURCE,
        bed.E5 if "e5m2" in form else bed.E4,
        rows=not squares,
        scale_name="weight_scale",
        extras=declared,
        blocks=fp8_squares if squares else None,
    )[0]


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_words_of_convert_to_quant(kind, tmp_path):
    plan = plan_of(tmp_path, gridded(f"float8_{kind}_rowwise", False))
    assert {layer.grid for layer in plan.layers.values()} == {ROW}
    plan = plan_of(tmp_path, gridded(f"float8_{kind}_blockwise", True, group_size=128))
    assert {layer.grid for layer in plan.layers.values()} == {BLOCK}
    assert {layer.format for layer in plan.layers.values()} == {f"float8_{kind}"}


@pytest.mark.parametrize(
    "form, squares, options",
    [
        ("float8_e4m3fn_blockwise", False, {}),
        ("float8_e4m3fn_rowwise", True, {}),
        ("float8_e4m3fn_tensorwise", False, {}),
        ("float8_e4m3fn_blockwise", True, {"group_size": 64}),
    ],
)
def test_scales_that_the_word_does_not_fit(form, squares, options, tmp_path):
    with pytest.raises(FrugalError, match=r"declares fp8 \w+ and has scales of shape"):
        plan_of(tmp_path, gridded(form, squares, **options))


def test_other_words_are_refused(tmp_path):
    with pytest.raises(FrugalError, match="declares the format 'float8_e4m3fn_rowwise2'"):
        plan_of(tmp_path, gridded("float8_e4m3fn_rowwise2", False))
