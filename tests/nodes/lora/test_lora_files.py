"""LoRA files: every naming, every kind of change, and a word on each key that is not applied."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes.lora import apply
from frugal.nodes.lora import file as lora_file
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.lora import SOURCE, factors, lora, output, put, reference, with_changes

pytestmark = pytest.mark.usefixtures("inference")
LAYERS = bed.block_linears(SOURCE)
OUTSIDE = ["text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"]
EXACT = 1e-5


@pytest.fixture
def fp8(tmp_path):
    """(model, the weights that it stands for)"""
    tensors, _, meant = bed.scaled(SOURCE, bed.E4, marker=torch.zeros(2).to(bed.E4))
    return load_run.load_wan(bed.write(tmp_path / "fp8.safetensors", tensors))[0], meant


def noise(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def renamed(tensors, name, up=".lora_up.weight", down=".lora_down.weight"):
    found = {}
    for key, value in tensors.items():
        layer, _, suffix = key.removeprefix("diffusion_model.").partition(".lora_")
        found[name(layer) + (up if suffix.startswith("B") else down)] = value
    return found


def diffusers(layer):
    return bed.to_diffusers(f"{layer}.weight").removesuffix(".weight")


PEFT = (".lora_B.weight", ".lora_A.weight")
NAMINGS = {
    "kohya": (lambda layer: "lora_unet_" + layer.replace(".", "_"),),
    "Wan Fun": (lambda layer: "lora_unet__" + layer.replace(".", "_"),),
    "kohya, diffusers names": (lambda layer: "lora_unet_" + diffusers(layer).replace(".", "_"),),
    "LyCORIS": (lambda layer: "lycoris_" + layer.replace(".", "_"),),
    "OneTrainer": (lambda layer: "lora_transformer_" + diffusers(layer).replace(".", "_"),),
    "diffusers": (lambda layer: f"transformer.{diffusers(layer)}", *PEFT),
    "Finetrainers": (lambda layer: f"diffusion_model.{diffusers(layer)}", *PEFT),
    "peft": (lambda layer: f"base_model.model.{layer}", *PEFT),
    "bare, default adapter": (
        lambda layer: layer,
        ".lora_B.default.weight",
        ".lora_A.default.weight",
    ),
    "bare, diffusers names": (diffusers, *PEFT),
    "old diffusers": (
        lambda layer: f"transformer.{diffusers(layer)}",
        "_lora.up.weight",
        "_lora.down.weight",
    ),
}


@pytest.mark.parametrize("label", NAMINGS)
def test_every_naming_gives_the_same(label, fp32, tmp_path):
    tensors, dense = lora(LAYERS + OUTSIDE)
    wanted = reference(with_changes(SOURCE, (dense, 1.0)))
    changed, report = put(fp32, tmp_path, renamed(tensors, *NAMINGS[label]))
    assert (report.beside, report.keys, report.left) == (len(tensors), len(tensors), {})
    assert bed.relative(output(changed), wanted) <= EXACT


def lycoris(layer, kind):
    """(file content, dense change) of one layer."""
    rows, width = SOURCE[f"{layer}.weight"].shape
    name = f"diffusion_model.{layer}"
    if kind == "LoHa":
        pairs = [factors((rows, width), seed, 3) for seed in (11, 12)]
        held = {
            f"{name}.hada_w{n}_{side}": tensor
            for n, pair in enumerate(pairs, 1)
            for side, tensor in zip("ab", pair, strict=True)
        }
        dense = 2.0 * (pairs[0][0] @ pairs[0][1]) * (pairs[1][0] @ pairs[1][1]) * 8
        return held | {f"{name}.alpha": torch.tensor(48.0)}, dense
    outer = noise(8, 4, seed=13)
    inner = factors((rows // 8, width // 4), 14, 2)
    held = {f"{name}.lokr_w1": outer}
    dense = torch.kron(outer, inner[0] @ inner[1]) / 2
    if kind == "LoKr":
        held |= {f"{name}.lokr_w2": inner[0] @ inner[1] / 2}
    else:
        held |= {f"{name}.lokr_w2_a": inner[0], f"{name}.lokr_w2_b": inner[1]}
        held |= {f"{name}.alpha": torch.tensor(1.0)}
    return held, dense


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, inner a product"])
def test_lycoris_kinds_are_exact(kind, fp8, tmp_path):
    model, meant = fp8
    held, dense = {}, {}
    for layer in LAYERS[:7]:
        tensors, dense[layer] = lycoris(layer, kind)
        held |= tensors
    changed, report = put(model, tmp_path, held, 0.6)
    assert (report.beside, report.layers, report.left) == (len(held), 7, {})
    wanted = with_changes(meant, (dense, 0.6))
    assert bed.relative(output(changed), reference(wanted)) <= EXACT
    assert bed.relative(output(model), reference(wanted)) > 0.01
    # ComfyUI's own arithmetic of the same file on the same weights.
    file = lora_file.read(tmp_path / "lora.safetensors", model.model)
    for entry in file.entries:
        name = entry.name.removeprefix("diffusion_model.")
        patch = [(0.6, entry.patch, 1.0, None, None)]
        theirs = comfy.lora.calculate_weight(patch, meant[name].clone(), name)
        assert bed.relative(theirs, wanted[name]) <= 1e-6


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora(strength, fp8, tmp_path):
    """magnitude * (W + BA) / ||W + BA|| of the dequantised W, and plain LoRAs with it."""
    model, meant = fp8
    layers = ["blocks.0.ffn.0", "blocks.1.self_attn.o"]
    tensors, dense = lora(layers, alpha=2)
    wanted = with_changes(meant)
    for number, layer in enumerate(layers):
        weight = meant[f"{layer}.weight"]
        changed = weight + dense[layer]
        magnitude = weight.norm(dim=1) * (1 + 0.3 * noise(weight.shape[0], seed=number).abs())
        # Both shapes are in use.
        shape = (-1, 1) if number else (-1,)
        tensors[f"diffusion_model.{layer}.dora_scale"] = magnitude.reshape(shape)
        result = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        wanted[f"{layer}.weight"] = weight + strength * (result - weight)
    more, plain = lora(LAYERS, 2)
    ours, report = put(model, tmp_path, tensors, strength)
    assert (report.left, report.layers) == ({}, 2)
    assert bed.relative(output(ours), reference(wanted)) <= EXACT
    both = reference(with_changes(wanted, (plain, 1.0)))
    assert bed.relative(output(put(ours, tmp_path, more)[0]), both) <= EXACT
    other_order = put(put(model, tmp_path, more)[0], tmp_path, tensors, strength)[0]
    assert bed.relative(output(other_order), both) <= EXACT
    # A second magnitude on one layer has no meaning beside the first.
    name = "diffusion_model.blocks.0.ffn.0.dora_scale"
    wide = {**tensors, name: torch.ones(1, 256)}
    assert "not one for each output" in put(model, tmp_path, wide)[1].left[name]


def test_what_is_not_low_rank(fp8, tmp_path):
    """Biases go beside the layer, other unquantised parameters are changed, quantised ones are
    not and are named.
    """
    model, meant = fp8
    tensors, dense = lora(LAYERS[:3])
    prefix, held = "diffusion_model.", dict(tensors)
    wanted = with_changes(meant, (dense, 0.5))
    beside = {"blocks.0.ffn.2.bias": ".diff_b", "blocks.0.self_attn.q.bias": ".diff_b"}
    inside = {
        "blocks.0.norm3.weight": ".diff", "blocks.1.norm3.bias": ".diff_b",
        "blocks.0.self_attn.norm_q.weight": ".diff", "head.head.weight": ".diff",
    }  # fmt: skip
    for number, (name, ending) in enumerate({**beside, **inside}.items()):
        change = 0.3 * noise(*SOURCE[name].shape, seed=number)
        held[prefix + name.rpartition(".")[0] + ending] = change
        wanted[name] += 0.5 * change
    modulation = 0.3 * noise(1, 6, 256, seed=20)
    held[f"{prefix}blocks.1.modulation.diff"] = modulation
    wanted["blocks.1.modulation"] += 0.5 * modulation
    up, down = noise(256, 4, 1, 1, 1, seed=21), 0.1 * noise(4, 16, 1, 2, 2, seed=22)
    held |= {
        f"{prefix}patch_embedding.lora_up.weight": up,
        f"{prefix}patch_embedding.lora_down.weight": down,
    }
    change = (up.flatten(1) @ down.flatten(1)).reshape(256, 16, 1, 2, 2)
    wanted["patch_embedding.weight"] += 0.5 * change
    refused = f"{prefix}blocks.1.ffn.0.diff"
    held[refused] = noise(512, 256)
    before = output(model)
    changed, report = put(model, tmp_path, held, 0.5)
    assert (report.beside, report.inside) == (len(tensors) + 3, len(inside) + 2)
    assert list(report.left) == [refused] and "merge it before quantising" in report.left[refused]
    assert f"- {refused}: a whole 'diff'" in report.text() and "in place" in report.text()
    assert bed.relative(output(changed), reference(wanted)) <= EXACT
    assert torch.equal(output(model), before)
    again = put(changed, tmp_path, {f"{prefix}blocks.1.modulation.diff": modulation}, 0.25)[0]
    wanted["blocks.1.modulation"] += 0.25 * modulation
    assert bed.relative(output(again), reference(wanted)) <= EXACT


def test_keys_without_a_place_are_reported(fp32, tmp_path):
    tensors, dense = lora(LAYERS[:4])
    lost = {
        "diffusion_model.blocks.7.ffn.0.lora_B.weight": noise(512, 4),
        "diffusion_model.blocks.7.ffn.0.lora_A.weight": noise(4, 256),
        "lora_unet_img_emb_proj_1.alpha": torch.tensor(1.0),
    }
    odd = {
        f"diffusion_model.{LAYERS[5]}.lora_sideways": noise(2),
        f"diffusion_model.{LAYERS[0]}.lora_C.bias": noise(256),
    }
    narrow = f"diffusion_model.{LAYERS[6]}"
    bad = {f"{narrow}.lora_B.weight": noise(256, 4), f"{narrow}.lora_A.weight": noise(4, 128)}
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    changed, report = put(fp32, tmp_path, {**tensors, **lost, **odd, **bad, **text})
    assert report.beside == len(tensors) and report.keys == len(tensors) + 7
    assert report.text_encoder == 1
    assert set(report.left) == {*lost, *odd, *bad}
    assert {report.left[key] for key in lost} == {"no such layer in this model"}
    assert {report.left[key] for key in odd} == {"not read by ComfyUI"}
    assert all("shape [256, 128] for a layer of [256, 256]" in report.left[key] for key in bad)
    assert f": 7 of {len(tensors) + 7} keys not applied:" in report.text()
    wanted = reference(with_changes(SOURCE, (dense, 1.0)))
    assert bed.relative(output(changed), wanted) <= EXACT


def test_a_file_that_fits_nowhere_is_an_error(fp32, tmp_path):
    with pytest.raises(FrugalError, match=r"has 2 keys and none that fits \(double_blocks.0"):
        put(fp32, tmp_path, {f"double_blocks.0.lora_{s}.weight": noise(4, 4) for s in "AB"})
    with pytest.raises(FrugalError, match="the file is empty"):
        put(fp32, tmp_path, {"lora_te_x.alpha": torch.tensor(1.0)})


def test_two_entries_for_one_layer_both_count(fp32, tmp_path):
    """ComfyUI's reader lets the second replace the first."""
    layer = "head.head"
    tensors, dense = lora([layer])
    change = noise(64, 256) / 16
    tensors[f"diffusion_model.{layer}.diff"] = change
    changed, report = put(fp32, tmp_path, tensors)
    assert (report.beside, report.inside, report.left) == (2, 1, {})
    wanted = reference(with_changes(SOURCE, (dense, 1.0), ({layer: change}, 1.0)))
    assert bed.relative(output(changed), wanted) <= EXACT


def test_int8_layer_inside_another_module_is_not_touched():
    """A parent that runs an int8 layer by itself in a way that cannot be taken apart."""

    class Parent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Linear(4, 4)
            self.down.weight._layout_cls = "TensorWiseINT8Layout"

        def forward(self, x):
            return linear_input_act(self.down, x, "swiglu")  # noqa: F821

    model = torch.nn.ModuleDict({"ffn": Parent()})
    layer = model.get_submodule("ffn.down")
    assert apply._computed_inside(model, "ffn.down", layer)
    layer.weight._layout_cls = "AnotherLayout"
    assert not apply._computed_inside(model, "ffn.down", layer)
