"""What is decided from a Wan file's header, and every refusal with its number, layer and remedy."""

from __future__ import annotations

import json
import random
import struct
import sys

import pytest
import torch

from frugal.kernels.checkpoints.normalise import declaration, normalise
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.checkpoints.wan_shapes import parameters
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers import wan as bed

SMALL = bed.variant(bed.T2V, dim=8, ffn_dim=16, text_dim=4096)
SOURCE = bed.weights(SMALL)
Q = "blocks.0.self_attn.q"
MARK = torch.zeros(2, dtype=bed.E4)


def scaled(**options) -> bed.Weights:
    return bed.scaled(SOURCE, bed.E4, config=SMALL, **options)[0]


def plan_file(folder, tensors, metadata=None):
    path = bed.write(folder / "wan.safetensors", tensors, metadata)
    source = open_source(path)
    return source, plan_wan(source.name, source.tensors, source.metadata, source.value)


def without(tensors: bed.Weights, *names: str) -> bed.Weights:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def bf16() -> bed.Weights:
    return bed.base(SOURCE)[0]


def with_block_scales() -> bed.Weights:
    return scaled(scale_name="weight_scale") | {f"{Q}.weight_scale": torch.ones(8, 3, 1)}


def declared(**entry) -> bed.Weights:
    return scaled(scale_name="weight_scale") | bed.declare(Q, **entry)


def int8(*side: str) -> bed.Weights:
    tensors = bf16() | {f"{Q}.weight": torch.ones(8, 8, dtype=torch.int8)}
    return tensors | {f"{Q}.{suffix}": torch.ones(8) for suffix in side}


def native(form: str, **changes: torch.Tensor) -> bed.Weights:
    tensors = bf16() | bed.fake_native("blocks.0.ffn.2", form, 8, 16)
    return tensors | {f"blocks.0.ffn.2.{suffix}": value for suffix, value in changes.items()}


def w4a16(group: int = 8, **changes: torch.Tensor) -> bed.Weights:
    layer = "blocks.0.ffn.2"
    held = {
        "weight": torch.ones(8, 8, dtype=torch.int8),
        "weight_scale": torch.ones(2, 8),
        "weight_zeros": torch.ones(2, 8),
        **changes,
    }
    tensors = bf16() | bed.declare(layer, format="awq_w4a16", group_size=group)
    return tensors | {f"{layer}.{suffix}": value for suffix, value in held.items()}


HEADER = "_quantization_metadata"
# label -> (tensors, metadata, what the message must say)
REFUSED = {
    "missing key": (lambda: without(bf16(), f"{Q}.bias"), None, f"lacks {Q}.bias; expected all 69"),
    "three missing": (
        lambda: without(bf16(), f"{Q}.bias", f"{Q}.weight", "head.head.weight"),
        None,
        "lacks .* and 2 more tensors",
    ),
    "missing block": (
        lambda: {name: value for name, value in bf16().items() if "blocks.0.self" not in name},
        None,
        "lacks blocks.0.self_attn",
    ),
    "block far away": (
        lambda: bf16() | {"blocks.99999999.norm3.bias": torch.ones(8)},
        None,
        "blocks up to number 99999999",
    ),
    "unknown key": (lambda: bf16() | {"extra.weight": torch.ones(2)}, None, "holds extra.weight"),
    "scale of a norm": (
        lambda: scaled() | {"blocks.0.norm3.scale_weight": torch.ones(())},
        None,
        "holds blocks.0.norm3.scale_weight",
    ),
    "wrong shape": (lambda: bf16() | {f"{Q}.weight": torch.ones(8, 9)}, None, r"shape \[8, 9\]"),
    "wrong bias": (lambda: bf16() | {f"{Q}.bias": torch.ones(9)}, None, r"bias has shape \[9\]"),
    "integer bias": (
        lambda: bf16() | {f"{Q}.bias": torch.ones(8, dtype=torch.int32)},
        None,
        "q.bias is int32",
    ),
    "one scale missing": (
        lambda: without(scaled(), f"{Q}.scale_weight"),
        None,
        f"{Q} and 0 more fp8 layers have no scale, while 19 other layers have one",
    ),
    "all scales missing": (
        lambda: {
            name: value
            for name, value in scaled(marker=MARK).items()
            if not name.endswith("scale_weight")
        },
        None,
        "19 more fp8 layers have no scale, while the marker scaled_fp8",
    ),
    "marker alone": (lambda: bf16() | {"scaled_fp8": MARK}, None, "marker scaled_fp8 and no fp8"),
    "scale of a plain weight": (
        lambda: bf16() | {f"{Q}.scale_weight": torch.tensor(0.5)},
        None,
        "has the scale scale_weight and a weight that is not quantised",
    ),
    "both scale names": (
        lambda: scaled() | {f"{Q}.weight_scale": torch.ones(())},
        None,
        "both scale_weight and weight_scale",
    ),
    "scale per block": (with_block_scales, None, r"scales of shape \[8, 3, 1\]"),
    "scale per column": (
        lambda: scaled() | {f"{Q}.scale_weight": torch.ones(1, 8)},
        None,
        r"scales of shape \[1, 8\]",
    ),
    "integer scale": (
        lambda: scaled() | {f"{Q}.scale_weight": torch.ones((), dtype=torch.int32)},
        None,
        "scale in int32",
    ),
    "int8 without scale": (int8, None, "int8 without a scale"),
    "activation scale per channel": (
        lambda: scaled() | {f"{Q}.scale_input": torch.full((8,), 2.0)},
        None,
        r"activation scales scale_input of shape \[8\] that are not 1",
    ),
    "packed int8": (
        lambda: int8("weight_scale") | {f"{Q}.weight": torch.ones(8, 4, dtype=torch.int8)},
        None,
        r"shape \[8, 4\]",
    ),
    "bytes without a format": (
        lambda: bf16() | {f"{Q}.weight": torch.ones(8, 4, dtype=torch.uint8)},
        None,
        "no declared format",
    ),
    "second scale undeclared": (
        lambda: scaled(scale_name="weight_scale") | {f"{Q}.weight_scale_2": torch.ones(())},
        None,
        "weight_scale_2 and no declared format",
    ),
    "unknown format": (lambda: declared(format="int3_magic"), None, "int3_magic"),
    "no format": (lambda: declared(other=1), None, "declares the format None"),
    "fp8 declared, bf16 held": (
        lambda: bf16() | bed.declare(Q, format="float8_e4m3fn"),
        None,
        "holds bfloat16",
    ),
    "damaged comfy_quant": (
        lambda: scaled(scale_name="weight_scale")
        | {f"{Q}.comfy_quant": torch.tensor([123], dtype=torch.uint8)},
        None,
        "damaged blocks.0.self_attn.q.comfy_quant",
    ),
    "comfy_quant of floats": (
        lambda: scaled(scale_name="weight_scale") | {f"{Q}.comfy_quant": torch.ones(3)},
        None,
        "expected bytes",
    ),
    "comfy_quant against header": (
        lambda: declared(format="float8_e4m3fn"),
        {HEADER: json.dumps({"layers": {Q: {"format": "mxfp8"}}})},
        "as mxfp8 and as float8_e4m3fn",
    ),
    "header with text per layer": (
        bf16,
        {HEADER: json.dumps({"layers": {Q: "float8_e4m3fn"}})},
        "an object with a format",
    ),
    "header of another model": (
        bf16,
        {HEADER: json.dumps({"layers": {"double_blocks.0": {"format": "float8_e4m3fn"}}})},
        "which it does not hold",
    ),
    "damaged header metadata": (bf16, {HEADER: "{"}, "damaged _quantization_metadata"),
    "nvfp4 without second scale": (
        lambda: without(native("nvfp4"), "blocks.0.ffn.2.weight_scale_2"),
        None,
        "nvfp4 without weight_scale_2",
    ),
    "nvfp4 of another width": (
        lambda: native("nvfp4", weight=torch.ones(8, 16, dtype=torch.uint8)),
        None,
        r"shape \[8, 16\]",
    ),
    "w4a16 without zeros": (
        lambda: without(w4a16(), "blocks.0.ffn.2.weight_zeros"),
        None,
        "awq_w4a16 without weight_zeros",
    ),
    "w4a16 of another group": (lambda: w4a16(group=5), None, "scale group 5 for width 16"),
    "w4a16 with transposed scales": (
        lambda: w4a16(weight_scale=torch.ones(8, 2)),
        None,
        r"has weight_scale float32 \[8, 2\]; expected floats of shape \[2, 8\]",
    ),
    "w4a16 as bytes": (
        lambda: w4a16(weight=torch.ones(8, 8, dtype=torch.uint8)),
        None,
        "expected int8",
    ),
    "w4a8 with correction": (
        lambda: native("asym_w4a8_int8", weight_correction=torch.ones(8)),
        None,
        "a tensor of asymmetric W4A8 with correction",
    ),
    "w4a8 of 6 bits": (
        lambda: native("asym_w4a8_int8", weight=torch.ones(8, 12, dtype=torch.int8)),
        None,
        r"comfy-kitchen runs it.*ffn.2 is W6A8, 6 bits",
    ),
    "rotation group that does not divide": (
        lambda: native("convrot_w4a4"),
        None,
        "rotation group 256 for width 16",
    ),
    "weight and words": (lambda: bf16() | {f"{Q}.qweight": torch.ones(2)}, None, "both as weight"),
    "words of another shape": (
        lambda: without(bf16(), f"{Q}.weight")
        | {f"{Q}.{suffix}": torch.ones(2, 2) for suffix in ("qweight", "qzeros", "scales")},
        None,
        r"words of shape \[2, 2\] for a weight of \[8, 8\]",
    ),
    "zero points of nothing": (
        lambda: bf16() | {f"{Q}.qzeros": torch.ones(2)},
        None,
        "q is packed without qweight, scales",
    ),
    "damaged settings of GPTQ": (bf16, {"quantization_config": "[]"}, "no JSON object"),
    "quanto": (lambda: bf16() | {f"{Q}.weight._data": torch.ones(2)}, None, "quanto"),
    "bitsandbytes": (lambda: bf16() | {f"{Q}.weight.absmax": torch.ones(2)}, None, "bitsandbytes"),
    "LightX2V NVFP4 in part": (
        lambda: bf16() | {f"{Q}.alpha": torch.ones(())},
        None,
        "has alpha of LightX2V NVFP4; expected alpha with input_global_scale",
    ),
    "LightX2V scales of a plain weight": (
        lambda: bf16()
        | {f"{Q}.{suffix}": torch.ones(()) for suffix in ("alpha", "input_global_scale")}
        | {f"{Q}.weight_scale": torch.ones(())},
        None,
        r"holds bfloat16 \[8, 8\]; expected uint8 \[8, 4\]",
    ),
    "S2V": (
        lambda: bf16() | {"casual_audio_encoder.x.weight": torch.ones(2)},
        None,
        "inside ComfyUI.* is Wan 2.2 S2V",
    ),
    "LoRA": (
        lambda: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2)},
        None,
        "looks like a LoRA",
    ),
    "VAE": (
        lambda: {"decoder.middle.0.residual.0.gamma": torch.ones(2)},
        None,
        "looks like a Wan VAE",
    ),
    "text encoder": (
        lambda: {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.ones(2)},
        None,
        "looks like a text encoder",
    ),
    "VACE module": (
        lambda: {"vace_blocks.0.after_proj.weight": torch.ones(2)},
        None,
        "VACE module without its base",
    ),
    "two models": (
        lambda: bf16() | {f"model.{name}": value for name, value in bf16().items()},
        None,
        "holds 2 models",
    ),
    "unknown prefix": (
        lambda: {f"video_model.{name}": value for name, value in bf16().items()},
        None,
        "no head.modulation",
    ),
    "tensor outside the prefix": (
        lambda: {f"model.{name}": value for name, value in bf16().items()} | {"x": torch.ones(2)},
        None,
        "holds x outside the prefix 'model.'",
    ),
    "same name twice": (
        lambda: bf16() | {f"_orig_mod.{Q}.bias": torch.ones(8)},
        None,
        f"holds {Q}.bias twice",
    ),
    "config against shapes": (
        bf16,
        {"config": json.dumps({"transformer": {"dim": 5120}})},
        "says dim 5120 in its config, the model has 8",
    ),
    "config with another epsilon": (
        bf16,
        {"config": json.dumps({"transformer": {"eps": 0.01}})},
        "says eps",
    ),
    "damaged config": (bf16, {"config": "[1]"}, "no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_names_file_number_and_remedy(kind, tmp_path):
    make, metadata, message = REFUSED[kind]
    with pytest.raises(FrugalError, match=message) as caught:
        plan_file(tmp_path, make(), metadata)
    text = str(caught.value)
    assert "wan.safetensors" in text and text.isascii() and caught.value.do


def test_gguf_without_its_library(tmp_path, monkeypatch):
    path = tmp_path / "wan.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FrugalError, match=r"'pip install gguf'.*package gguf is not installed"):
        open_source(path)


def test_scale_that_is_not_finite(tmp_path):
    source, plan = plan_file(tmp_path, scaled() | {f"{Q}.scale_weight": torch.tensor(float("nan"))})
    with pytest.raises(
        FrugalError, match=f"{Q}.weight_scale holds 1 values that are negative or not finite"
    ):
        normalise(plan, {name: source.value(name) for name in source.tensors})


def test_scale_of_one_beside_a_plain_weight_is_dropped_and_reported(tmp_path):
    _, plan = plan_file(tmp_path, bf16() | {f"{Q}.scale_weight": torch.ones(())})
    assert "1 scales of unquantised weights are left out" in plan.notes
    assert f"{Q}.scale_weight" not in plan.rename


def test_format_unknown_to_the_running_version(tmp_path):
    _, plan = plan_file(tmp_path, bed.int8_rows(SOURCE, config=SMALL)[0])
    with pytest.raises(FrugalError, match=r"20 layers in int8_tensorwise .* unknown"):
        declaration(plan, ["float8_e4m3fn"])
    layers = json.loads(declaration(plan, ["int8_tensorwise"])[HEADER])["layers"]
    assert layers[Q] == {"format": "int8_tensorwise"}


def test_normalise_passes_weights_on_without_copy(tmp_path):
    source, plan = plan_file(tmp_path, scaled(marker=MARK))
    tensors = {name: source.value(name) for name in source.tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = normalise(plan, tensors)
    assert set(out) == set(parameters(SMALL)) | {f"{layer}.weight_scale" for layer in plan.layers}
    for name in parameters(SMALL):
        assert out[name].data_ptr() == tensors[name].data_ptr()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), before[name].float())


def test_report_counts_every_weight_byte(tmp_path):
    _, plan = plan_file(tmp_path, scaled())
    linears = sum(SOURCE[f"{layer}.weight"].numel() for layer in plan.layers)
    rest = sum(tensor.numel() for tensor in SOURCE.values()) - linears
    assert plan.formats == {"float8_e4m3fn, scale per tensor": linears, "bfloat16": 2 * rest}


def test_300_mutated_wan_files_are_refused_or_mean_the_same(tmp_path):
    """Damage to the header never gives another model: whatever is accepted maps the same bytes."""
    tensors = scaled(marker=MARK)
    source, plan = plan_file(tmp_path, tensors)
    original = facts(source, plan)
    raw = (tmp_path / "wan.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path = tmp_path / "mutated.safetensors"
    accepted = 0
    for seed in range(300):
        chance = random.Random(seed)
        mutated = bytearray(raw)
        for _ in range(chance.randint(1, 2)):
            place = chance.randrange(8, 8 + length)
            mutated[place] = chance.choice(b'0123456789abz_.ABEF"{}[],: ')
        path.write_bytes(mutated)
        try:
            damaged = open_source(path)
            again = plan_wan(damaged.name, damaged.tensors, damaged.metadata, damaged.value)
        except FrugalError as error:
            assert str(error).isascii()
            continue
        accepted += 1
        assert facts(damaged, again) == original
    assert 0 < accepted < 150


def facts(source, plan):
    return {name: source.tensors[raw] for raw, name in plan.rename.items()}, plan.layers
