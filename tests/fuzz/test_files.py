"""Damaged files of every kind that the pack reads without ComfyUI: a right load or one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from frugal.kernels.causal import session_file
from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.storage import PageFormat
from frugal.kernels.checkpoints import gguf_file
from frugal.kernels.checkpoints.header import read_header
from frugal.kernels.checkpoints.normalise import normalise, take_packed
from frugal.kernels.checkpoints.resolve import plan_wan
from frugal.kernels.checkpoints.source import open_source
from frugal.kernels.checkpoints.text_embeds import read_text_embeds, write_text_embeds
from frugal.kernels.errors import FrugalError
from frugal.kernels.lora.scale import stated_scale
from frugal.kernels.quantize import quality
from frugal.kernels.quantize.calibration import read_calibration, write_calibration
from frugal.kernels.quantize.moments import Gatherer
from frugal.tests.fuzz.mutations import damaged, strange_json, strange_tensors
from frugal.tests.fuzz.watch import Watch, cases
from frugal.tests.helpers import wan as bed

SMALL = bed.variant(bed.T2V, dim=8, ffn_dim=16, text_dim=4096)
SOURCE = bed.weights(SMALL)
NUMBER = 250


def try_all(tmp_path: Path, kind: str, whole: Path, read, count: int = NUMBER, check=None) -> None:
    """Damage the file `whole` in many ways; `check(path, result)` looks at what was read."""
    good, path = whole.read_bytes(), tmp_path / f"damaged{whole.suffix}"
    assert read(whole) is not None
    with Watch(kind) as watch:
        for number, chance in enumerate(cases(kind, count)):
            path.write_bytes(damaged(good, chance))
            found = watch(f"case {number}", lambda: read(path))
            if found is not None and check is not None:
                check(path, found)
    print(f"{kind}: {watch.read} read, {watch.refused} refused")  # noqa: T201


def as_the_library(path: Path, source) -> None:
    """What was read is what the format's own library reads."""
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        raise AssertionError(f"read, though the library says: {error}") from error
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        name: info.shape for name, info in source.tensors.items()
    }


WAN = {
    "fp8": lambda: bed.scaled(SOURCE, bed.E4, config=SMALL)[:2],
    "int8": lambda: bed.int8_rows(SOURCE, declared=True, config=SMALL)[:2],
    "bf16": lambda: (bed.base(SOURCE)[0], {"config": json.dumps({"transformer": {}})}),
    "gptq": lambda: bed.gptq_or_awq(bed.weights(), **next(iter(bed.PACKED_LAYOUTS.values())))[:2],
}


def load_wan(path: Path):
    source = open_source(path)
    plan = plan_wan(source.name, source.tensors, source.metadata, source.value)
    tensors = load_file(path) if path.suffix == ".safetensors" else source.loaded
    state = normalise(plan, tensors)
    take_packed(plan, state)
    for name, tensor in state.items():
        if name.endswith("_scale"):
            scale = tensor.float()
            assert bool((scale.isfinite() & (scale >= 0)).all()), name
    return source


@pytest.mark.parametrize("label", WAN)
def test_wan_safetensors(tmp_path, label):
    tensors, metadata = WAN[label]()
    whole = bed.write(tmp_path / "wan.safetensors", tensors, metadata)
    try_all(tmp_path, f"wan {label}", whole, load_wan, check=as_the_library)


@pytest.mark.parametrize("label", WAN)
def test_wan_tensors(tmp_path, label):
    """Files that are sound as files: what stands in them is not what the layout says."""
    tensors, metadata = WAN[label]()
    path = tmp_path / "wan.safetensors"
    with Watch(f"wan {label}, tensors") as watch:
        for number, chance in enumerate(cases(f"tensors {label}", NUMBER)):
            changed = dict(tensors)
            strange_tensors(changed, chance)
            bed.write(path, changed, metadata)
            found = watch(f"case {number}", lambda: load_wan(path))
            if found is not None:
                as_the_library(path, found)
    print(f"wan {label}, tensors: {watch.read} read, {watch.refused} refused")  # noqa: T201


def test_pytorch_files(tmp_path):
    torch.save({"model": bed.base(SOURCE)[0]}, tmp_path / "wan.pt")
    try_all(tmp_path, "pt", tmp_path / "wan.pt", load_wan)


@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="the package gguf is not here")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_files(tmp_path, kind):
    from frugal.tests.helpers import gguf as gguf_bed

    gguf_bed.write(tmp_path / "wan.gguf", bed.weights(), kind)

    def read(path: Path):
        found, tensors, _ = gguf_file.open_gguf(path, None)
        for name in tensors:
            assert tensors[name].nbytes <= path.stat().st_size
        return found

    try_all(tmp_path, f"gguf {kind}", tmp_path / "wan.gguf", read)


def test_index_files(tmp_path):
    index = bed.split(tmp_path, bed.base(SOURCE)[0])
    good = json.loads(index.read_text())
    with Watch("index") as watch:
        for number, chance in enumerate(cases("index", NUMBER)):
            changed = strange_json(json.loads(json.dumps(good)), chance)
            index.write_text(json.dumps(changed), encoding="utf-8", errors="replace")
            watch(f"case {number}", lambda: open_source(index))


def test_scales_of_loras(tmp_path):
    path = tmp_path / "lora.safetensors"
    said = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    save_file({"a.lora_A.weight": torch.zeros(4, 4)}, path, said)

    def read(path: Path):
        return stated_scale(path, read_header(path).metadata)

    try_all(tmp_path, "lora", path, read)


def test_text_embeddings(tmp_path):
    extras = {"pooled_output": torch.ones(1, 8), "start": 0.5, "name": "x"}
    write_text_embeds([(torch.randn(1, 4, 8), extras)] * 2, tmp_path / "e.safetensors")

    def check(path: Path, found) -> None:
        assert all(each[0].dim() == 3 and each[0].isfinite().all() for each in found)

    try_all(tmp_path, "embeddings", tmp_path / "e.safetensors", read_text_embeds, check=check)


@pytest.mark.parametrize("kind", ["model", "int8"])
def test_sessions(tmp_path, kind):
    fmt = PageFormat((1, 4, 2, 16), torch.float32, kind)
    cache = VideoCache(fmt, 3, torch.device("cpu"), CacheOptions(window=4, kind=kind))
    for first in (0, 2):
        cache.start_block(2, None)
        with cache.writing(torch.full((1, 1, 2, 1, 1), float(first))):
            for layer in range(3):
                k, v = torch.randn(2, 1, 8, 2, 16).unbind(0)
                cache.store(layer, (0,), k, v)
    session_file.save(cache, tmp_path / "s.safetensors")

    def read(path: Path):
        return session_file.load(path, torch.device("cpu"))

    def check(path: Path, found: VideoCache) -> None:
        assert found.next_frame > max(each.frame for each in found.kept)
        assert all(bool(latent.isfinite().all()) for latent in found.clean.values())

    try_all(tmp_path, f"session {kind}", tmp_path / "s.safetensors", read, check=check)


def test_calibrations(tmp_path):
    moments = {}
    for index in range(2):
        gatherer = Gatherer(16, 64)
        gatherer.add(torch.randn(90, 16, generator=torch.Generator().manual_seed(index)))
        moments[index] = gatherer.moment("layer")
    write_calibration(tmp_path / "c.safetensors", {"a": 0, "b": 1}, moments, {"steps": 4})

    def read(path: Path):
        found = read_calibration(path)
        for layer in found.inputs:
            found.layer(layer)
        return found

    try_all(tmp_path, "calibration", tmp_path / "c.safetensors", read)


def test_quality_reports(tmp_path):
    path = tmp_path / "w.quality.json"
    report = quality.report_of("w", "s", 100, [], None, ["a note"])
    quality.write_json(report, path)
    good = json.loads(path.read_text())
    with Watch("quality report") as watch:
        for number, chance in enumerate(cases("quality", NUMBER)):
            path.write_text(json.dumps(strange_json(json.loads(json.dumps(good)), chance)))
            watch(f"case {number}", lambda: quality.read_json(path))


def test_a_file_of_one_number_that_claims_to_be_a_model(tmp_path):
    """Views that repeat one number: 4 TB of weights in a kilobyte."""
    path = tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(FrugalError, match="the same numbers again and again"):
        open_source(path)


def test_an_archive_that_grows_without_end(tmp_path):
    import zipfile

    torch.save({"w": torch.zeros(10**7)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(FrugalError, match="grows from"):
        open_source(tmp_path / "bomb.pt")
