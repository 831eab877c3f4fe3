"""The header reader on good, damaged and mutated files, beside the safetensors library."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from frugal.kernels.checkpoints.header import DTYPES, read_header
from frugal.kernels.errors import FrugalError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.ones(2, dtype=torch.bfloat16),
    "b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path.read_bytes()


def build(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_good_file(good, tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(good)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    info = header.tensors["a.weight"]
    raw = torch.frombuffer(bytearray(good[info.start : info.end]), dtype=info.dtype)
    assert torch.equal(raw.reshape(info.shape), TENSORS["a.weight"])


def test_every_first_byte_of_a_header_length(tmp_path):
    """A length may begin with the bytes of a pickle or of text: such a file is still good."""
    path = tmp_path / "file.safetensors"
    for extra in range(256):
        path.write_bytes(build(json.dumps({"x": entry()}).encode() + b" " * extra, bytes(8)))
        assert list(read_header(path).tensors) == ["x"]


WRONG = {
    "empty": (b"", "empty"),
    "three bytes": (b"abc", "announces a header"),
    "length beyond the file": (build(b"{}")[:9], "announces a header"),
    "length of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "announces a header"),
    "pickle": (b"PK\x03\x04" + bytes(60), "pickle"),
    "old pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9" + bytes(60), "pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
    "web page": (b"<!DOCTYPE html><html></html>", "text file"),
    "pointer": (b"version https://git-lfs.example/spec/v1\n", "text file"),
    "no json": (build(b"{]"), "damaged header"),
    "no utf-8": (build(b'{"\xff": 1}'), "damaged header"),
    "deep json": (build(b"[" * 100_000), "damaged header"),
    "list": (build([1, 2]), "is a list"),
    "name twice": (
        build(f'{{"x": {json.dumps(entry())}, "x": {json.dumps(entry())}}}'.encode(), bytes(8)),
        "occurs twice",
    ),
    "nan": (build(b'{"x": NaN}'), "damaged header"),
    "huge number": (build(b'{"x": ' + b"9" * 5000 + b"}"), "damaged header|wrongly"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "metadata"),
    "metadata a list": (build({"__metadata__": []}), "metadata"),
    "entry a number": (build({"x": 3}), "describes the tensor x wrongly"),
    "entry without shape": (build({"x": {"dtype": "F32"}}), "describes the tensor x wrongly"),
    "unknown dtype": (build({"x": entry("F4")}, bytes(8)), "stores the tensor x as"),
    "dtype a list": (build({"x": entry(["F32"])}, bytes(8)), "stores the tensor x as"),
    "negative shape": (build({"x": entry(shape=(-2,))}, bytes(8)), "the shape"),
    "boolean shape": (build({"x": entry(shape=(True,))}, bytes(8)), "the shape"),
    "float shape": (build({"x": entry(shape=(2.0,))}, bytes(8)), "the shape"),
    "rank 9": (build({"x": entry(shape=(1,) * 9)}, bytes(8)), "the shape"),
    "offsets backwards": (build({"x": entry(offsets=(8, 0))}, bytes(8)), "the offsets"),
    "three offsets": (build({"x": entry(offsets=(0, 4, 8))}, bytes(8)), "the offsets"),
    "bytes do not fit": (build({"x": entry(shape=(3,))}, bytes(8)), "8 bytes; expected 12"),
    "overflowing shape": (build({"x": entry(shape=(2**40, 2**40))}, bytes(8)), "8 bytes"),
    "hole": (build({"x": entry(offsets=(8, 16))}, bytes(16)), "at byte"),
    "overlap": (build({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), "at byte"),
    "twice the same bytes": (build({"x": entry(), "y": entry()}, bytes(8)), "at byte"),
    "truncated": (build({"x": entry()}, bytes(7)), "bytes by its header"),
    "trailing bytes": (build({"x": entry()}, bytes(9)), "bytes by its header"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_file_is_named_and_refused(kind, tmp_path):
    content, message = WRONG[kind]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    with pytest.raises(FrugalError, match=message) as caught:
        read_header(path)
    assert "wrong.safetensors" in str(caught.value)
    assert str(caught.value).isascii()


def test_missing_file(tmp_path):
    with pytest.raises(FrugalError, match="cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def mutate(good: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    raw = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(8 + int.from_bytes(good[:8], "little"))
        kind = chance.randrange(5)
        if kind == 0:
            raw[place] = chance.randrange(256)
        elif kind == 1:
            raw[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del raw[place : place + chance.randint(1, 40)]
        elif kind == 3:
            raw[place:place] = bytes(chance.choices(b'0123456789[]{}",:aF', k=chance.randint(1, 9)))
        else:
            digits = [i for i in range(8, len(raw)) if chr(raw[i]).isdigit()]
            raw[chance.choice(digits or [place])] = ord(chance.choice("0123456789"))
    return bytes(raw)


def compare_with_library(path) -> bool:
    """True if the header was accepted; then the library must accept it and say the same."""
    try:
        header = read_header(path)
    except FrugalError as error:
        assert str(error).isascii()
        return False
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
    return True


def test_1000_mutated_files(good, tmp_path):
    path = tmp_path / "mutated.safetensors"
    accepted = 0
    for seed in range(1000):
        path.write_bytes(mutate(good, seed))
        accepted += compare_with_library(path)
    # Mutations of names or of metadata leave a good file: both outcomes must occur.
    assert 5 <= accepted < 500


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([code for code in DTYPES if code != "F8_E8M0"]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
def test_well_formed_headers_are_accepted(tmp_path_factory, content):
    position, header = 0, {}
    for name, (code, shape) in content.items():
        size = DTYPES[code].itemsize
        for length in shape:
            size *= length
        header[name] = entry(code, shape, (position, position + size))
        position += size
    path = tmp_path_factory.mktemp("made") / "made.safetensors"
    path.write_bytes(build(header, bytes(position)))
    found = read_header(path)
    assert {name: list(info.shape) for name, info in found.tensors.items()} == {
        name: shape for name, (_, shape) in content.items()
    }
