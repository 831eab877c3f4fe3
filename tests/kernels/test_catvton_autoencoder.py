"""Canonical names and structure of SD-style autoencoders, against diffusers' AutoencoderKL."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from frugal.kernels.checkpoints.autoencoder_kl import canonical_autoencoder
from frugal.kernels.errors import FrugalError


def shapes(widths, layers, **options):
    levels = len(widths)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=4,
            norm_num_groups=32,
            **options,
        )
    return {name: tuple(t.shape) for name, t in vae.state_dict().items()}


DEMO = shapes((32, 32, 64, 128), 1)


@pytest.mark.parametrize(
    "widths, layers", [((128, 256, 512, 512), 2), ((32, 32, 64, 128), 1), ((64, 64, 128), 3)]
)
def test_structure_is_read_and_every_tensor_is_named(widths, layers):
    layout, table = canonical_autoencoder(shapes(widths, layers), "x")
    assert (layout.widths, layout.num_res_blocks) == (widths, layers)
    assert layout.factor == 2 ** (len(widths) - 1)
    assert dict(table.values()) == layout.shapes()
    assert table["decoder.up_blocks.0.resnets.0.conv1.weight"][0] == (
        f"decoder.up.{len(widths) - 1}.block.0.conv1.weight"
    )
    assert table["encoder.mid_block.attentions.0.to_q.weight"] == (
        "encoder.mid.attn_1.q.weight",
        (widths[-1], widths[-1], 1, 1),
    )


def test_canonical_names_are_their_own_image_also_inside_a_checkpoint():
    layout, table = canonical_autoencoder(DEMO, "x")
    ldm = dict(table.values())
    assert canonical_autoencoder(ldm, "x") == (layout, {n: (n, s) for n, s in ldm.items()})
    whole = {f"first_stage_model.{name}": shape for name, shape in ldm.items()}
    found = canonical_autoencoder(whole | {"model.diffusion_model.x": (1,)}, "x")
    assert found[0] == layout and set(found[1]) == set(whole)


def test_the_older_attention_names_mean_the_same():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, older in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{older}.")
        return name

    older = {rename(name): shape for name, shape in DEMO.items()}
    assert older.keys() != DEMO.keys()
    assert dict(canonical_autoencoder(older, "x")[1].values()) == dict(
        canonical_autoencoder(DEMO, "x")[1].values()
    )


def test_missing_unknown_and_misshapen_tensors_are_refused():
    less = dict(DEMO)
    del less["decoder.up_blocks.1.resnets.0.norm1.bias"]
    for bad, match in (
        (less, "lacks 1 tensors"),
        (DEMO | {"loss.logvar": ()}, "unknown ones .'loss.logvar'"),
        (DEMO | {"quant_conv.bias": (7,)}, "quant_conv.bias"),
        ({"x": (1,)}, "no usable"),
        (shapes((32, 32, 64, 128), 1, use_quant_conv=False, use_post_quant_conv=False), "quant"),
        (shapes((32, 32, 64, 128), 1, mid_block_add_attention=False), "lacks"),
    ):
        with pytest.raises(FrugalError, match=match):
            canonical_autoencoder(bad, "x")
