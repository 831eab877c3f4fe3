"""Names, containers and variants: the same weights under other names give the same model."""

from __future__ import annotations

import json
import zipfile

import comfy.sd
import pytest
import torch
from diffusers import WanTransformer3DModel

from frugal.kernels.checkpoints.source import check_file
from frugal.kernels.errors import FrugalError
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as bed

PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "generator.",
    "generator_ema.",
    "generator.model.",
    "generator_ema.model.",
    "model._fsdp_wrapped_module.",
    "generator_ema._fsdp_wrapped_module.model._fsdp_wrapped_module.",
)


def load(path, dtype="fp32"):
    with torch.inference_mode():
        return load_run.load_wan(path, dtype)


def held_weights(patcher) -> bed.Weights:
    return {
        name: tensor.detach() for name, tensor in patcher.model.diffusion_model.named_parameters()
    }


def same(patcher, expected: bed.Weights) -> bool:
    held = held_weights(patcher)
    return set(held) == set(expected) and all(
        torch.equal(held[name], expected[name]) for name in held
    )


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_is_removed(prefix, tmp_path):
    source = bed.weights()
    path = bed.write(tmp_path / "wan.safetensors", {prefix + name: source[name] for name in source})
    assert same(load(path)[0], source)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefix_before_scales_and_marker(prefix, tmp_path):
    tensors, _, meant = bed.scaled(bed.weights(), bed.E4, marker=torch.zeros(2, dtype=bed.E4))
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    patcher, _ = load(bed.write(tmp_path / "wan.safetensors", tensors), "default")
    held = held_weights(patcher)
    for name, expected in meant.items():
        value = held[name].dequantize() if hasattr(held[name], "_qdata") else held[name]
        assert bed.relative(value, expected) <= 1e-6


def test_parts_of_an_all_in_one_checkpoint_are_left_out_and_reported(tmp_path):
    source = bed.weights()
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in source.items()}
    tensors |= {"vae.decoder.conv1.weight": torch.ones(3), "vae.conv2.weight": torch.ones(3)}
    patcher, report = load(bed.write(tmp_path / "wan.safetensors", tensors))
    assert same(patcher, source)
    assert "2 tensors under vae. are left out" in report.notes


@pytest.mark.parametrize(
    "nesting", ["flat", "state_dict", "generator_ema", "generator and generator_ema"]
)
def test_pytorch_file(nesting, tmp_path):
    source, other = bed.weights(seed=1), bed.weights(seed=2)
    student = {f"model.{name}": tensor for name, tensor in source.items()}
    content = {
        "flat": source,
        "state_dict": {"state_dict": source, "epoch": 3},
        "generator_ema": {"generator_ema": student},
        "generator and generator_ema": {"generator": other, "generator_ema": student, "step": 7},
    }[nesting]
    path = tmp_path / "wan.pt"
    torch.save(content, path)
    assert same(load(path)[0], source)


def test_pickle_that_was_zipped_again(tmp_path):
    """With compression the mapped bytes are not the weights."""
    source = bed.weights()
    torch.save(source, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "wan.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert same(load(tmp_path / "wan.pt")[0], source)
    with pytest.raises(FrugalError, match=r"save it with torch.save: wan.pt .* zipped again"):
        check_file(tmp_path / "wan.pt")
    check_file(tmp_path / "whole.pt")


def test_parts_with_an_index(tmp_path):
    source = bed.weights()
    names = list(source)
    parts = {
        "a-00001-of-00002.safetensors": names[::2],
        "a-00002-of-00002.safetensors": names[1::2],
    }
    for file, chosen in parts.items():
        bed.write(tmp_path / file, {name: source[name] for name in chosen})
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    patcher, report = load(index)
    assert same(patcher, source)
    assert set(report.files) == set(parts)
    with pytest.raises(FrugalError, match="part 1 of 2"):
        load(tmp_path / "a-00001-of-00002.safetensors")


def tiny_diffusers(config) -> WanTransformer3DModel:
    torch.manual_seed(5)
    extra = {"image_dim": 1280, "added_kv_proj_dim": config.dim} if config.image else {}
    if config.flf_tokens:
        extra["pos_embed_seq_len"] = config.flf_tokens
    model = WanTransformer3DModel(
        num_attention_heads=config.dim // 128,
        attention_head_dim=128,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        **extra,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales start at one and biases at zero: then a swapped norm would go unseen.
            parameter.add_(0.2 * torch.randn_like(parameter) if "norm" in name else 0)
    return model.eval()


@pytest.mark.parametrize("config", [bed.T2V, bed.I2V], ids=["T2V", "I2V"])
def test_parity_with_diffusers(config, tmp_path):
    peer = tiny_diffusers(config)
    path = bed.write(tmp_path / "wan.safetensors", dict(peer.state_dict()))
    patcher, report = load(path)
    assert report.notes[0].startswith("diffusers names")
    # Their I2V attention takes all but the last 512 tokens for the image.
    given = bed.inputs(config, tokens=512)
    with torch.inference_mode():
        expected = peer(
            given["x"],
            given["timestep"],
            given["context"],
            encoder_hidden_states_image=given.get("clip_fea"),
            return_dict=False,
        )[0]
        out = patcher.model.diffusion_model(**given)
    assert bed.relative(out, expected) <= 1e-4


def test_diffusers_names_of_a_scaled_file(tmp_path):
    peer = tiny_diffusers(bed.T2V)
    tensors, meant = {}, {}
    for name, tensor in peer.state_dict().items():
        tensors[name] = tensor
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2:
            tensors[name], scale, meant[name] = bed.fp8(tensor, bed.E4, rows=True)
            tensors[f"{name}_scale"] = scale
    patcher, _ = load(bed.write(tmp_path / "wan.safetensors", tensors), "default")
    held = held_weights(patcher)
    pairs = {
        "blocks.1.attn2.to_out.0.weight": "blocks.1.cross_attn.o.weight",
        "blocks.0.ffn.net.0.proj.weight": "blocks.0.ffn.0.weight",
        "blocks.0.attn1.to_k.weight": "blocks.0.self_attn.k.weight",
    }
    for theirs, ours in pairs.items():
        assert bed.relative(held[ours].dequantize(), meant[theirs]) <= 1e-6


def native(source: bed.Weights):
    return comfy.sd.load_diffusion_model_state_dict(
        dict(source), model_options={"dtype": torch.float32}
    )


VARIANTS = {
    "I2V": bed.I2V,
    "FLF2V": bed.variant(bed.I2V, flf_tokens=514),
    "VACE": bed.VACE,
    "Fun control": bed.variant(bed.I2V, in_dim=48, ref_dim=16),
    "Fun control without reference": bed.variant(bed.I2V, in_dim=48),
    # Fun inpaint has I2V's channels: 16 noise, 4 mask, 16 image.
    "I2V without end (Fun inpaint)": bed.variant(bed.I2V, in_dim=36),
    "Fun camera": bed.variant(bed.I2V, in_dim=32, camera=True),
    "I2V without image encoder (Wan 2.2)": bed.variant(bed.T2V, in_dim=36),
}


@pytest.mark.parametrize("label", VARIANTS)
def test_variant_has_exactly_the_parameters_of_core(label, tmp_path):
    config = VARIANTS[label]
    source = bed.weights(config)
    built = dict(native(source).model.diffusion_model.named_parameters())
    assert {name: tuple(value.shape) for name, value in built.items()} == {
        name: tuple(value.shape) for name, value in source.items()
    }
    patcher, report = load(bed.write(tmp_path / "wan.safetensors", source))
    assert same(patcher, source)
    assert report.title.startswith(f"Wan {label.split(' without')[0]} ")


def test_variant_unknown_to_core_is_refused_before_loading(tmp_path):
    path = bed.write(tmp_path / "wan.safetensors", bed.weights(bed.variant(bed.I2V, in_dim=40)))
    with pytest.raises(FrugalError, match="40 input channels"):
        load(path)


def test_own_configuration_is_read_or_refused(tmp_path):
    """Older versions do not read a configuration: dropping it would load another model."""
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    path = bed.write(tmp_path / "wan.safetensors", bed.weights(), metadata)
    if hasattr(comfy.supported_models, "WAN21_CausalAR_T2V"):
        assert type(load(path)[0].model).__name__ == "WAN21_CausalAR"
    else:
        with pytest.raises(FrugalError, match="causal_ar"):
            load(path)


PREFERS = b'{"attention": "comfy_kitchen_int8"}'


def with_preferences(tensors):
    wish = torch.tensor(list(PREFERS), dtype=torch.uint8)
    names = [f"blocks.{i}.self_attn.comfy_attention.config" for i in range(2)]
    return tensors | {name: wish.clone() for name in names}


@pytest.mark.parametrize("known", [False, True])
def test_choices_of_attention_kernels(known, tmp_path, monkeypatch):
    """From ComfyUI 0.36 on: handed on where they are known, else named and left out."""
    attention, given = load_run.comfy.ldm.modules.attention, []
    if known:
        monkeypatch.setattr(attention, "ComfyAttention", object, raising=False)
    elif hasattr(attention, "ComfyAttention"):
        pytest.skip("this ComfyUI knows them")
    load_into = comfy.sd.load_diffusion_model_state_dict

    def watched(state_dict, **more):
        given.append(set(state_dict))
        return load_into(state_dict, **more)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", watched)
    source = bed.weights()
    tensors = {f"model.diffusion_model.{name}": t for name, t in with_preferences(source).items()}
    patcher, report = load(bed.write(tmp_path / "wan.safetensors", tensors))
    assert same(patcher, source)
    assert ("blocks.1.self_attn.comfy_attention.config" in given[0]) == known
    (note,) = (note for note in report.notes if "attention kernel" in note)
    assert note.startswith("2 layers choose") and "comfy_kitchen_int8" in note
    assert ("does not read" in note) != known
    tensors = with_preferences(source)
    tensors["blocks.0.self_attn.comfy_attention.config"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(FrugalError, match=r"damaged blocks.0.self_attn.comfy_attention.config"):
        load(bed.write(tmp_path / "wan.safetensors", tensors))
