"""The converter: every layout in, ComfyUI's own formats out, everything else to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from frugal.kernels.checkpoints.header import read_header
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import codec, table
from frugal.kernels.formats.gguf_blocks import TYPES
from frugal.kernels.quantize import convert as module
from frugal.kernels.quantize.convert import convert, uniform
from frugal.kernels.quantize.weights import Weights
from frugal.tests.helpers import wan as bed

pytest.importorskip("comfy_kitchen")
SMALL = bed.variant(bed.I2V, dim=64, ffn_dim=128, layers=1, text_dim=64)
QUANTISED = [target for target in table.TARGETS if target != table.BF16]


@pytest.fixture(scope="module")
def floats():
    return bed.weights(SMALL)


def written(folder, tensors, metadata=None, name="wan.safetensors"):
    text = {"config": json.dumps({"transformer": {"text_dim": 64}}), **(metadata or {})}
    return bed.write(folder / name, tensors, text)


def quantised(path, target, out, **more):
    source = Weights(path)
    choice = uniform(source, target) if isinstance(target, str) else target
    return convert(source, out, choice, **more)


def meaning(path) -> bed.Weights:
    """The float32 weights that a file stands for, by the decoder alone."""
    held = Weights(path)
    found = {}
    for unit in held.units():
        if unit in held.shapes:
            found[f"{unit}.weight"] = held.weight(unit).float().clone()
        else:
            found.update({name: t.float().clone() for name, t in held.stored(unit).items()})
    return found


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


HALF, FULL = torch.float16, torch.float32
CASES = [(target, torch.bfloat16) for target in table.TARGETS]
CASES += [(table.BF16, HALF), (table.BF16, FULL), (table.AWQ, HALF), (table.INT8, FULL)]


@pytest.mark.parametrize(("target", "dtype"), CASES)
def test_large_layers_change_and_nothing_else(target, dtype, floats, tmp_path):
    held = bed.base(floats, dtype)[0]
    out = tmp_path / "out.safetensors"
    report = quantised(written(tmp_path, held), target, out)
    made, layers = load_file(out), bed.block_linears(floats, SMALL)
    declared = json.loads(metadata(out).get("_quantization_metadata", '{"layers": {}}'))["layers"]
    assert sorted(declared) == (sorted(layers) if target != table.BF16 else [])
    expected = {}
    for name, tensor in held.items():
        layer = name.removesuffix(".weight")
        if layer in layers and name.endswith(".weight"):
            parts = codec.encode(target, tensor, "cpu")
            expected |= {f"{layer}.{suffix}": value for suffix, value in parts.items()}
            if target != table.BF16:
                own = json.loads(bytes(made[f"{layer}.comfy_quant"].tolist()))
                assert own == declared[layer] == table.options(target, tuple(tensor.shape))
        else:
            expected[name] = tensor
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        assert same(made[name], tensor), name
    assert report.target_bytes == out.stat().st_size == read_header(out).file_size
    if target != table.BF16:
        size = sum(table.stored_bytes(target, tuple(held[f"{x}.weight"].shape)) for x in layers)
        assert report.layers[target] == (len(layers), size)
    assert sum(count for count, _ in report.layers.values()) == len(Weights(out).shapes)
    assert report.payload_bytes == sum(tensor.nbytes for tensor in made.values())
    told = json.loads(metadata(out)["frugal"])
    assert told["source"] == "wan.safetensors" and told["tool"].endswith(module.VERSION)


def test_version_is_the_projects():
    tomllib = pytest.importorskip("tomllib")
    from pathlib import Path

    text = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    assert tomllib.loads(text)["project"]["version"] == module.VERSION


@pytest.mark.parametrize("target", QUANTISED)
def test_converting_again_changes_no_byte(target, floats, tmp_path):
    path = written(tmp_path, bed.base(floats)[0])
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    quantised(path, target, first)
    report = quantised(first, target, second)
    one, two = load_file(first), load_file(second)
    assert set(one) == set(two) and all(same(one[name], two[name]) for name in one)
    assert not any("twice" in note for note in report.notes)
    third = tmp_path / "3.safetensors"
    quantised(first, {}, third)
    assert all(same(one[name], tensor) for name, tensor in load_file(third).items())


def test_a_format_per_layer(floats, tmp_path):
    path = written(tmp_path, bed.base(floats)[0])
    choice = {
        "head.head": table.FP8,
        "time_embedding.0": table.INT8,
        "blocks.0.ffn.0": table.W4A8,
        "blocks.0.ffn.2": table.W4A8_G64,
        "blocks.0.self_attn.q": table.BF16,
    }
    out = tmp_path / "out.safetensors"
    report = quantised(path, choice, out)
    made = Weights(out)
    assert {layer: entry.format for layer, entry in made.plan.layers.items()} == {
        layer: table.FORMATS[target] for layer, target in choice.items() if "q" not in layer
    }
    assert report.layers.keys() == {*choice.values(), "bfloat16"} - {table.BF16}
    with pytest.raises(FrugalError, match=r"asked for blocks\.7\.ffn\.0"):
        quantised(path, {"blocks.7.ffn.0": table.FP8}, tmp_path / "no.safetensors")


BROKEN = ("missing", "unknown", "fit no block")
REQUANTISED = (
    "fp32",
    "e5m2 scale_weight to 448, e5m2 marker",
    "e4m3 weight_scale [rows,1], no marker (LightX2V)",
    "int8 weight_scale [rows], comfy_quant",
    "GPTQ 4 bits, act-order",
    "NVFP4, LightX2V, alpha",
    "GGUF Q4_0",
    "bf16, two parts and an index",
)
BECOMES_BF16 = ("[rows", "per row and", "per square", "GPTQ", "AWQ")


def test_every_layout_becomes_comfyuis_own(tmp_path):
    """As stored, the meaning stays, to the rounding of bf16 at most; requantised, near to it."""
    pytest.importorskip("gguf")
    files, done = bed.layout_files(tmp_path), set()
    for number, (name, (path, meant)) in enumerate(files.items()):
        kept, made = tmp_path / f"{number}k.safetensors", tmp_path / f"{number}m.safetensors"
        if any(word in name for word in BROKEN):
            with pytest.raises(FrugalError):
                quantised(path, {}, kept)
            continue
        report = quantised(path, {}, kept)
        got, opened = meaning(kept), any(word in name for word in BECOMES_BF16)
        opened = opened and "int8" not in name
        assert set(got) == set(meant), name
        for key, weight in meant.items():
            bound = (2**-8 if opened else 1e-6) * weight.float().abs()
            if name.startswith("GGUF"):
                # Unpacked to float16 first, whose smallest step is 2**-24.
                bound = 2**-11 * weight.float().abs() + 2**-25
            assert bool(((got[key] - weight.float()).abs() <= bound).all()), (name, key)
        assert any("layers become bf16" in note for note in report.notes) == opened, name
        packed = name.startswith("GGUF") and name.split()[1].rstrip(",") in TYPES
        assert any("layers become fp16" in note for note in report.notes) == packed, name
        if name not in REQUANTISED:
            continue
        report = quantised(path, table.INT8, made)
        got = meaning(made)
        for layer in bed.block_linears(meant):
            key = f"{layer}.weight"
            assert bed.relative(got[key], meant[key]) < 0.02, (name, key)
        floats = any(name.startswith(word) for word in ("fp32", "fp16", "bf16", "GGUF F16"))
        assert any("rounded twice" in note for note in report.notes) != floats, name
        done.add(name)
    assert number > 40 and done == set(REQUANTISED)


def test_fp8_asked_of_fp8_stays(floats, tmp_path):
    tensors, _, _ = bed.scaled(floats, bed.E4, config=SMALL)
    out = tmp_path / "out.safetensors"
    report = quantised(written(tmp_path, tensors), table.FP8, out)
    made = load_file(out)
    for layer in bed.block_linears(floats, SMALL):
        assert same(made[f"{layer}.weight"], tensors[f"{layer}.weight"])
        assert float(made[f"{layer}.weight_scale"]) == float(tensors[f"{layer}.scale_weight"])
    assert not any("twice" in note for note in report.notes)


def test_small_fp8_parameters_become_bf16(floats, tmp_path):
    config = bed.variant(SMALL, image=False, in_dim=16)
    source = bed.weights(config)
    tensors = {name: tensor.to(bed.E4) for name, tensor in source.items()}
    out = tmp_path / "out.safetensors"
    quantised(written(tmp_path, tensors), table.INT8, out)
    made = load_file(out)
    assert made["blocks.0.norm3.bias"].dtype == torch.bfloat16
    assert torch.equal(made["blocks.0.norm3.bias"].float(), tensors["blocks.0.norm3.bias"].float())
    assert made["head.head.weight"].dtype == bed.E4
    assert float(made["head.head.weight_scale"]) == 1.0


class Doubled:
    """A merge that doubles one quantised weight, one bias, one plain weight."""

    title = identity = "doubled"
    names = frozenset({"blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias", "time_embedding.0.weight"})
    notes = ("3 of 3 keys",)

    def apply(self, name, weight):
        assert weight.dtype == torch.float32
        return weight.mul_(2)


@pytest.mark.parametrize("target", [table.BF16, table.FP8, table.AWQ])
def test_merge_comes_before_rounding(target, floats, tmp_path):
    held = bed.base(floats, torch.float16)[0]
    path = written(tmp_path, held)
    before = path.read_bytes()
    out = tmp_path / "out.safetensors"
    report = quantised(path, target, out, merge=Doubled())
    made = load_file(out)
    assert report.notes[-1] == "3 of 3 keys" and path.read_bytes() == before
    for name in ("blocks.0.ffn.0.bias", "time_embedding.0.weight"):
        assert same(made[name], held[name] * 2)
    weight = held["blocks.0.ffn.0.weight"].float() * 2
    weight = weight.half() if target == table.BF16 else weight
    for suffix, tensor in codec.encode(target, weight, "cpu").items():
        assert same(made[f"blocks.0.ffn.0.{suffix}"], tensor), suffix
    assert same(made["blocks.0.ffn.2.bias"], held["blocks.0.ffn.2.bias"])


def test_merge_into_a_quantised_layer_that_stays(floats, tmp_path):
    first, out = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    quantised(written(tmp_path, bed.base(floats)[0]), table.INT8, first)
    report = quantised(first, {}, out, merge=Doubled())
    one, two = meaning(first), meaning(out)
    assert bed.relative(two["blocks.0.ffn.0.weight"], 2 * one["blocks.0.ffn.0.weight"]) < 0.02
    assert any("1 layers were quantised already" in note for note in report.notes)


def test_measured_figures_survive_an_interruption(floats, tmp_path):
    path, out = written(tmp_path, bed.base(floats)[0]), tmp_path / "out.safetensors"
    seen = []

    def measure(layer, target, weight, made, statistics):
        seen.append(layer)
        return {"largest": float(weight.float().abs().max())}

    def stop(done, total):
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantised(path, table.INT8, out, measure=measure, progress=stop)
    assert not out.exists()
    report = quantised(path, table.INT8, out, measure=measure)
    assert report.resumed > 0
    assert sorted(report.measured) == sorted(set(seen)) == sorted(uniform(Weights(path), "fp8"))
    whole = tmp_path / "whole.safetensors"
    quantised(path, table.INT8, whole)
    assert out.read_bytes() == whole.read_bytes()


def test_progress_counts_every_byte(floats, tmp_path):
    calls, out = [], tmp_path / "out.safetensors"
    report = quantised(
        written(tmp_path, bed.base(floats)[0]), table.FP8, out,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (report.target_bytes, report.target_bytes)
    assert calls == sorted(calls) and len(calls) > 50


def test_choices_of_attention_kernels_go_over(floats, tmp_path):
    name = "blocks.0.self_attn.comfy_attention.config"
    wish = torch.tensor(list(b'{"attention": "x"}'), dtype=torch.uint8)
    out = tmp_path / "out.safetensors"
    quantised(written(tmp_path, floats | {name: wish}), table.FP8, out)
    assert torch.equal(load_file(out)[name], wish)
