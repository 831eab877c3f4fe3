"""GGUF files as a source: shapes, values, refusals, and damage that would make a reader loop."""

from __future__ import annotations

import importlib
import random
import struct

import pytest
import torch

from frugal.kernels.checkpoints import gguf_file
from frugal.kernels.checkpoints.plan import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.errors import FrugalError
from frugal.tests import wan_bed as bed

SMALL = bed.variant(bed.T2V, dim=32, ffn_dim=64, layers=1, text_dim=64)
SOURCE = bed.weights(SMALL)
gguf = pytest.importorskip("gguf", reason="GGUF files are read by the package gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_1"])
def test_values_are_the_librarys_rounded_once(kind, dtype, tmp_path):
    path = tmp_path / "wan.gguf"
    meant = bed.write_gguf(path, SOURCE, kind)
    source = open_source(path, dtype)
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in SOURCE.items()
    }
    for name, info in source.tensors.items():
        held = source.loaded[name]
        assert held.dtype == info.dtype and tuple(held.shape) == info.shape
        assert torch.equal(held, meant[name].to(info.dtype)), name
    quantised = kind.startswith("Q")
    layer = source.tensors["blocks.0.ffn.0.weight"]
    assert layer.dtype == (dtype if quantised else gguf_file.FLOATS[kind])
    linears = sum(SOURCE[f"{name}.weight"].numel() for name in bed.block_linears(SOURCE, SMALL))
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert source.blocks == ({kind: linears // block * size} if quantised else {})


def test_shape_is_needed_where_ggml_lacks_the_rank(tmp_path):
    path = tmp_path / "wan.gguf"
    bed.write_gguf(path, SOURCE, "Q8_0", shapes=False)
    source = open_source(path)
    with pytest.raises(FrugalError, match=r"patch_embedding.weight as \[32, 64\]"):
        plan_wan(source.name, source.tensors, {"config": "{}"}, source.value)


def test_type_that_the_library_cannot_unpack(tmp_path, monkeypatch):
    path = tmp_path / "wan.gguf"
    bed.write_gguf(path, SOURCE, "Q8_0")

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(importlib.import_module("gguf.quants"), "dequantize", refuse)
    with pytest.raises(FrugalError, match="as Q8_0, which the package gguf cannot unpack"):
        open_source(path).loaded["blocks.0.ffn.0.weight"]


def test_values_beyond_the_type(tmp_path):
    path = tmp_path / "wan.gguf"
    large = SOURCE | {"blocks.0.ffn.0.weight": 1e6 * SOURCE["blocks.0.ffn.0.weight"]}
    bed.write_gguf(path, large, "Q8_0")
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
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 4, 9_000_000)),
        "an entry ends at byte",
    ),
    "vast array": (
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 0, 2**60)),
        "an array of 1152921504606846976 entries",
    ),
    "nested array": (
        struct.pack("<IQQ", 3, 0, 1) + entry(9, struct.pack("<IQ", 9, 1)),
        "an array of 1 entries of type 9",
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
    bed.write_gguf(path, SOURCE, "Q8_0")
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
    bed.write_gguf(path, SOURCE, "Q8_0")
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
