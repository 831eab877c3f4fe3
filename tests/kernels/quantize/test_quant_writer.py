"""The file writer: what it writes is safetensors, and an interruption costs nothing but time."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from frugal.kernels.checkpoints.header import TensorInfo, read_header
from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize import writer
from frugal.kernels.quantize.writer import Writer, arranged, header_bytes

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8)


def tensors(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)
    noise = torch.randn(9, 8, generator=make)
    return [
        {"a.scale": noise[0, 0].clone(), "a.weight": noise.to(torch.float8_e4m3fn), "a.q": pad(4)},
        {"b.bias": noise[0, :3].bfloat16()},
        {"c.bias": noise[1, :3]},
        {"d.weight": noise.half()},
        {"e.empty": torch.empty(0, 4)},
    ]


def pad(count: int) -> torch.Tensor:
    return torch.full((count,), 32, dtype=torch.uint8)


def groups(content):
    return arranged(
        [{k: TensorInfo(t.dtype, tuple(t.shape)) for k, t in group.items()} for group in content]
    )


def fill(target, content, stop=None, fingerprint="f", **more):
    """Write as much as is missing, or `stop` groups of it; returns the writer."""
    by_name = {name: tensor for group in content for name, tensor in group.items()}
    with Writer(target, groups(content), {"k": "v"}, fingerprint, **more) as out:
        for group in out.groups[out.written : stop]:
            out.write({name: by_name[name] for name in group}, {next(iter(group)): 1})
        if stop is None:
            out.finish()
    return out


def test_file_is_safetensors_to_the_bit(tmp_path):
    content = tensors()
    path = tmp_path / "m.safetensors"
    out = fill(path, content)
    held = load_file(path)
    assert path.stat().st_size == out.size == read_header(path).file_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}
    for group in content:
        for name, tensor in group.items():
            assert torch.equal(held[name].view(-1).view(torch.uint8), bits(tensor)), name
    assert os.listdir(tmp_path) == ["m.safetensors"]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 9), st.integers(1, 5)), max_size=12)
)
def test_every_tensor_is_aligned(shapes):
    made = arranged([{f"t{n}": TensorInfo(t, (a, b))} for n, (t, a, b) in enumerate(shapes)])
    raw = header_bytes(made, {"a": "b"})
    assert len(raw) % 8 == 0
    entries = json.loads(raw[8:])
    for group in made:
        for name, info in group.items():
            start, end = entries[name]["data_offsets"]
            assert start % info.dtype.itemsize == 0 and end - start == info.nbytes


@pytest.mark.parametrize("stop", range(5))
def test_a_later_run_goes_on(stop, tmp_path):
    content, path = tensors(), tmp_path / "m.safetensors"
    whole = fill(tmp_path / "whole.safetensors", content)
    fill(path, content, stop)
    assert not path.exists() and (tmp_path / "m.safetensors.part").exists()
    out = fill(path, content)
    assert out.resumed == stop and out.notes == whole.notes
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "whole.safetensors"]


def test_data_behind_the_journal_do_not_count(tmp_path):
    """A crash can leave more data than the journal knows, and a journal line that is cut off."""
    content, path = tensors(), tmp_path / "m.safetensors"
    whole = tmp_path / "whole.safetensors"
    fill(whole, content)
    fill(path, content, 2)
    part, journal = tmp_path / "m.safetensors.part", tmp_path / "m.safetensors.part.json"
    part.write_bytes(part.read_bytes() + b"rubbish" * 20)
    journal.write_bytes(journal.read_bytes() + b'{"groups": 4, "byt')
    fill(path, content, 3)
    assert fill(path, content).resumed == 3
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["fingerprint", "content", "short part", "journal", "no part"])
def test_anything_else_starts_clean(change, tmp_path):
    content, path = tensors(), tmp_path / "m.safetensors"
    part, journal = tmp_path / "m.safetensors.part", tmp_path / "m.safetensors.part.json"
    fill(path, content, 3)
    fingerprint = "f"
    if change == "fingerprint":
        fingerprint = "g"
    elif change == "content":
        content = [*content, {"f": torch.ones(2)}]
    elif change == "short part":
        part.write_bytes(part.read_bytes()[:-1])
    elif change == "journal":
        journal.write_bytes(b"\0" * 50 + journal.read_bytes())
    else:
        part.unlink()
    whole = tmp_path / "whole.safetensors"
    fill(whole, content)
    out = fill(path, content, fingerprint=fingerprint)
    assert out.resumed == 0 and path.read_bytes() == whole.read_bytes()


def test_two_runs_on_one_target(tmp_path):
    content, path = tensors(), tmp_path / "m.safetensors"
    busy = pytest.raises(FrugalError, match=r"another run is writing m\.safetensors")
    with Writer(path, groups(content), {}, "f"), busy:
        Writer(path, groups(content), {}, "f")
    fill(path, content)


def test_existing_target_stays(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FrugalError, match=r"m\.safetensors exists already"):
        fill(path, tensors())
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["m.safetensors"]
    fill(path, tensors(), overwrite=True)
    assert load_file(path)


def test_target_that_appears_during_the_run_stays(tmp_path):
    content, path = tensors(), tmp_path / "m.safetensors"
    by_name = {name: tensor for group in content for name, tensor in group.items()}
    with Writer(path, groups(content), {}, "f") as out:
        for group in out.groups:
            out.write({name: by_name[name] for name in group})
        path.write_bytes(b"mine")
        with pytest.raises(FrugalError, match="exists already"):
            out.finish()
    assert path.read_bytes() == b"mine"


def test_disk_without_room(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    big = [{"a": torch.zeros(400)}]
    message = r"1000 bytes are free in .*; expected 1\d\d\d bytes for m.safetensors"
    with pytest.raises(FrugalError, match=message):
        fill(tmp_path / "m.safetensors", big)
    fill(tmp_path / "n.safetensors", [{"a": torch.zeros(100)}])


def test_disk_that_fills_up(tmp_path, monkeypatch):
    content, path = tensors(), tmp_path / "m.safetensors"
    by_name = {name: tensor for group in content for name, tensor in group.items()}
    with Writer(path, groups(content), {"k": "v"}, "f") as out:
        group = out.groups[0]
        out.write({name: by_name[name] for name in group})
        real = out._file

        class Full:
            closed = False

            def write(self, data):
                real.write(data[:1])
                raise OSError(28, "No space left on device")

            def __getattr__(self, name):
                return getattr(real, name)

        out._file = Full()
        with pytest.raises(FrugalError, match="free some space and run again"):
            out.write({name: by_name[name] for name in out.groups[1]})
    whole = tmp_path / "whole.safetensors"
    fill(whole, content)
    assert fill(path, content).resumed == 1
    assert path.read_bytes() == whole.read_bytes()


def test_wrong_tensors_are_refused(tmp_path):
    with Writer(tmp_path / "m", groups(tensors()), {}, "f") as out:
        group = dict.fromkeys(out.groups[0], torch.zeros(3, dtype=torch.float64))
        with pytest.raises(FrugalError, match=r"came as torch\.float64"):
            out.write(group)
        with pytest.raises(FrugalError, match=r"0 groups in m.part; expected 5"):
            out.finish()
