"""GGUF files as a source: shapes, values, refusals, and damage that would make a reader loop."""

from __future__ import annotations

import importlib
import random
import struct

import pytest
import torch

from frugal.kernels.checkpoints import gguf_file
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers import gguf as gguf_bed
from frugal.tests.helpers import wan as bed

SMALL = bed.variant(bed.T2V, dim=32, ffn_dim=64, layers=1, text_dim=64)
SOURCE = bed.weights(SMALL)
CONFIG = '{"transformer": {"text_dim": 64}}'
gguf = pytest.importorskip("gguf", reason="GGUF files are read by the package gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["F16", "BF16", *gguf_bed.WRITTEN])
def test_values_are_the_librarys_rounded_once(kind, dtype, tmp_path):
    check_values(tmp_path / "wan.gguf", SOURCE, SMALL, kind, dtype)


@pytest.mark.parametrize("kind", gguf_bed.BLOCKS)
def test_types_of_llama_quantize(kind, tmp_path):
    check_values(tmp_path / "wan.gguf", bed.weights(), bed.T2V, kind, torch.float32)


def check_values(path, weights, config, kind, dtype):
    meant = gguf_bed.write(path, weights, kind, config)
    source = open_source(path, dtype)
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    for name, info in source.tensors.items():
        held = source.loaded[name]
        assert held.dtype == info.dtype and tuple(held.shape) == info.shape
        assert torch.equal(held, meant[name].to(info.dtype)), name
    quantised = "F" not in kind
    layer = source.tensors["blocks.0.ffn.0.weight"]
    assert layer.dtype == (dtype if quantised else gguf_file.FLOATS[kind])
    linears = sum(weights[f"{name}.weight"].numel() for name in bed.block_linears(weights, config))
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert source.blocks == ({kind: linears // block * size} if quantised else {})


@pytest.mark.parametrize("others", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("patches", ["whole", "stated", "joined", "merged"])
def test_patch_embedding_of_every_writer(patches, others, tmp_path):
    path = tmp_path / "wan.gguf"
    meant = gguf_bed.write(path, SOURCE, "Q8_0", SMALL, patches=patches, others=others)
    source = open_source(path)
    assert plan_wan(source.name, source.tensors, {"config": CONFIG}, source.value)
    held = source.loaded["patch_embedding.weight"]
    assert held.shape == (32, 16, 1, 2, 2) and held.dtype == gguf_file.FLOATS[others]
    assert torch.equal(held.float(), meant["patch_embedding.weight"])


@pytest.mark.parametrize("arch", ["wan", "pig", None])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_architecture_and_prefix(arch, prefix, tmp_path):
    path = tmp_path / "wan.gguf"
    gguf_bed.write(path, SOURCE, "Q8_0", SMALL, arch=arch, prefix=prefix)
    source = open_source(path)
    assert plan_wan(source.name, source.tensors, {"config": CONFIG}, source.value).config == SMALL


def test_conversion_that_was_not_finished(tmp_path):
    path = tmp_path / "wan.gguf"
    gguf_bed.write(path, SOURCE, "Q8_0", SMALL, patches="absent")
    with pytest.raises(FrugalError, match=r"run fix_5d_tensors\.py of.* unfinished"):
        open_source(path)


def test_type_that_the_library_cannot_unpack(tmp_path, monkeypatch):
    path = tmp_path / "wan.gguf"
    gguf_bed.write(path, SOURCE, "Q8_0", SMALL)

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(importlib.import_module("gguf.quants"), "dequantize", refuse)
    with pytest.raises(FrugalError, match="as Q8_0, which the package gguf cannot unpack"):
        open_source(path).loaded["blocks.0.ffn.0.weight"]


def test_values_beyond_the_type(tmp_path):
    path = tmp_path / "wan.gguf"
    large = SOURCE | {"blocks.0.ffn.0.weight": 1e6 * SOURCE["blocks.0.ffn.0.weight"]}
    gguf_bed.write(path, large, "Q8_0", SMALL)
    assert open_source(path, torch.bfloat16).loaded["blocks.0.ffn.0.weight"].isfinite().all()
    with pytest.raises(FrugalError, match="values beyond float16"):
        open_source(path, torch.float16).loaded["blocks.0.ffn.0.weight"]


def entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"x" + struct.pack("<I", kind) + value


# label -> (bytes after the magic, what the message must say)
DAMAGED = {
    "version 1": (struct.pack("<IQQ", 1, 0, 0), "has version 1"),
    "many tensors": (struct.pack("<IQQ", 3, 2**40, 0), "1099511627776 tensors"),
    "many entries": (struct.pack("<IQQ", 3, 0, 2**40), "1099511627776 entries"),
    "long name": (struct.pack("<IQQQ", 3, 0, 1, 2**50), "an entry ends at byte"),
    "unknown type": (struct.pack("<IQQ", 3, 0, 1) + entry(13, b""), "a value of type 13"),
    "endless array": (
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 4, 1_400_000)),
        "an entry ends at byte",
    ),
    "vast array": (
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 0, 2**60)),
        "arrays of 1152921504606846976 entries",
    ),
    "nested array": (
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 9, 1)),
        "an array of arrays",
    ),
    "rank 9": (struct.pack("<IQQQ", 3, 1, 0, 1) + b"x" + struct.pack("<I", 9), "of 9 dimensions"),
    "truncated": (struct.pack("<IQQ", 3, 1, 0), "damaged GGUF file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_header(kind, tmp_path):
    content, message = DAMAGED[kind]
    path = tmp_path / "wan.gguf"
    path.write_bytes(b"GGUF" + content)
    with pytest.raises(FrugalError, match=message) as caught:
        open_source(path)
    assert str(caught.value).isascii() and "wan.gguf" in str(caught.value)


@pytest.mark.parametrize("change", [-1, -40, 1, 64])
def test_size_of_the_file(change, tmp_path):
    path = tmp_path / "wan.gguf"
    gguf_bed.write(path, SOURCE, "Q8_0", SMALL)
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    # The last tensor may end before padding, which is not part of any tensor.
    try:
        open_source(path)
    except FrugalError as error:
        assert "damaged" in str(error) or "bytes" in str(error)
    else:
        assert change == -1


def test_250_mutated_headers_are_refused_or_mean_the_same(tmp_path):
    path = tmp_path / "wan.gguf"
    gguf_bed.write(path, SOURCE, "Q8_0", SMALL)
    source = open_source(path)
    facts, raw = dict(source.tensors), path.read_bytes()
    start = min(int(t.data_offset) for t in gguf.GGUFReader(path).tensors)
    refused = 0
    for seed in range(250):
        chance = random.Random(seed)
        mutated = bytearray(raw)
        for _ in range(chance.randint(1, 3)):
            mutated[chance.randrange(start)] ^= 1 << chance.randrange(8)
        path.write_bytes(mutated)
        try:
            found = open_source(path)
            plan_wan(found.name, found.tensors, found.metadata, found.value)
        except FrugalError as error:
            refused += 1
            assert str(error).isascii()
            continue
        assert found.tensors == facts and found.blocks == source.blocks
        assert torch.equal(
            found.loaded["blocks.0.ffn.0.weight"], source.loaded["blocks.0.ffn.0.weight"]
        )
    assert refused > 150
