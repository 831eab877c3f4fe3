"""The attention file: one order, one count, exact keys; everything else is refused."""

from __future__ import annotations

import random

import pytest

from frugal.kernels.checkpoints import catvton
from frugal.kernels.errors import FrugalError

# The table of the published checkpoint: canonical module, width; down, up, then middle.
REAL = [
    ("input_blocks.1.1", 320),
    ("input_blocks.2.1", 320),
    ("input_blocks.4.1", 640),
    ("input_blocks.5.1", 640),
    ("input_blocks.7.1", 1280),
    ("input_blocks.8.1", 1280),
    ("output_blocks.3.1", 1280),
    ("output_blocks.4.1", 1280),
    ("output_blocks.5.1", 1280),
    ("output_blocks.6.1", 640),
    ("output_blocks.7.1", 640),
    ("output_blocks.8.1", 640),
    ("output_blocks.9.1", 320),
    ("output_blocks.10.1", 320),
    ("output_blocks.11.1", 320),
    ("middle_block.1", 1280),
]
MODULES = [f"{name}.transformer_blocks.0.attn1" for name, _ in REAL]
UNET = {
    f"{module}.{tensor}": (width,) if tensor.endswith("bias") else (width, width)
    for module, (_, width) in zip(MODULES, REAL, strict=True)
    for tensor in catvton.TENSORS
}


def attention_file(widths, stride=8):
    return {
        f"{stride * i}.{tensor}": (width,) if tensor.endswith("bias") else (width, width)
        for i, width in enumerate(widths)
        for tensor in catvton.TENSORS
    }


WIDTHS = [width for _, width in REAL]


@pytest.mark.parametrize("stride", [1, 7, 8, 9])
def test_every_tensor_lands_where_the_published_table_says(stride):
    items = list(attention_file(WIDTHS, stride).items())
    random.Random(stride).shuffle(items)
    table = catvton.attention_map(dict(items), UNET, MODULES, "a.safetensors")
    assert len(table) == 80 and set(table.values()) == set(UNET)
    for i, module in enumerate(MODULES):
        for tensor in catvton.TENSORS:
            assert table[f"{stride * i}.{tensor}"] == f"{module}.{tensor}"


def test_order_is_down_up_middle_by_number_not_by_text():
    names = {
        f"{part}.attn1.to_q.weight": f"x{i}.attn1.to_q.weight"
        for i, part in enumerate(
            [
                "mid_block.attentions.0.transformer_blocks.0",
                "up_blocks.1.attentions.10.transformer_blocks.0",
                "up_blocks.1.attentions.2.transformer_blocks.0",
                "down_blocks.0.attentions.0.transformer_blocks.1",
                "down_blocks.0.attentions.0.transformer_blocks.0",
            ]
        )
    }
    names["conv_in.weight"] = "input_blocks.0.0.weight"
    assert catvton.attention_order(names) == [f"x{i}.attn1" for i in (4, 3, 2, 1, 0)]


def refused(shapes, match, unet=UNET, modules=MODULES):
    with pytest.raises(FrugalError, match=match):
        catvton.attention_map(shapes, unet, modules, "a.safetensors")


def test_middle_block_in_the_wrong_place_is_refused():
    refused(attention_file([*WIDTHS[:6], 1280, *WIDTHS[6:15]]), "belong together")


def test_swapped_widths_are_refused():
    refused(attention_file([640, *WIDTHS[1:2], 320, *WIDTHS[3:]]), "belong together")


@pytest.mark.parametrize("widths", [WIDTHS[:15], [*WIDTHS, 1280]])
def test_wrong_block_counts_are_refused(widths):
    refused(attention_file(widths), f"has {len(widths)} attention blocks")


def test_unknown_and_missing_tensors_are_refused():
    refused(attention_file(WIDTHS) | {"1.weight": (320, 320)}, "the tensor '1.weight'")
    refused(attention_file(WIDTHS) | {"x.to_q.weight": (320, 320)}, "the tensor 'x.to_q.weight'")
    refused(attention_file(WIDTHS) | {"0.to_q.bias": (320,)}, "the tensor '0.to_q.bias'")
    short = attention_file(WIDTHS)
    del short["16.to_v.weight"]
    refused(short, "lacks '16.to_v.weight'")
    refused({}, "empty")


def test_mixed_strides_and_a_missing_first_block_are_refused():
    def renumbered(indices):
        plain = attention_file(WIDTHS, 1)
        return {
            f"{indices[int(n.split('.')[0])]}.{n.partition('.')[2]}": s for n, s in plain.items()
        }

    refused(renumbered([*range(0, 64, 8), *range(64, 64 + 8 * 7, 7)]), "block indices")
    refused(renumbered(range(8, 136, 8)), "block indices")


def test_a_matrix_of_another_shape_is_refused():
    refused(attention_file(WIDTHS) | {"8.to_k.weight": (320, 768)}, r"'8.to_k.weight' of shape")


def test_channel_counts_name_the_right_file():
    assert catvton.variant(9, "x") == catvton.MASKED
    assert catvton.variant(8, "x") == catvton.MASK_FREE
    for channels, word in ((4, "text-to-image"), (5, "5 input channels")):
        with pytest.raises(FrugalError, match=word) as caught:
            catvton.variant(channels, "x")
        assert "sd-v1-5-inpainting" in str(caught.value)


def test_metadata_rules():
    assert catvton.prediction_type({}, [], "x") == "epsilon"
    assert catvton.prediction_type({"modelspec.prediction_type": "v"}, [], "x") == "v"
    assert catvton.prediction_type({}, ["v_pred"], "x") == "v"
    assert catvton.prediction_type({"modelspec.prediction_type": "epsilon"}, ["v_pred"], "x") == (
        "epsilon"
    )
    with pytest.raises(FrugalError, match="sample"):
        catvton.prediction_type({"modelspec.prediction_type": "sample"}, [], "x")
    assert catvton.head_count({}, [320, 640], "x") == 8
    assert catvton.head_count({"num_heads": "4"}, [64], "x") == 4
    for text in ("0", "5", "many", "[5, 10]"):
        with pytest.raises(FrugalError, match="num_heads"):
            catvton.head_count({"num_heads": text}, [64], "x")


def test_the_unet_of_a_checkpoint_is_found_and_others_are_refused():
    names = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.x"]
    assert catvton.unet_names(names, "x") == ("ldm", {names[0]: "input_blocks.0.0.weight"})
    bare = ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]
    assert catvton.unet_names(bare, "x")[0] == "diffusers"
    with pytest.raises(FrugalError, match="no Stable Diffusion"):
        catvton.unet_names(["blocks.0.self_attn.q.weight", "conv_in.weight"], "wan")
