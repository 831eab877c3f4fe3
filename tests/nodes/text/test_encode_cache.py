"""Cached prompts: bit for bit what the stock nodes encode, and the encoder only for new ones."""

from __future__ import annotations

import json
import os
import shutil

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

import nodes as stock
from frugal.kernels.errors import FrugalError
from frugal.nodes.text import cached_encode_run
from frugal.nodes.text.cached_encode import FrugalCachedTextEncode
from frugal.tests.helpers.umt5 import LAYERS, MARKER, MARKER_SHAPE, PIECES, WIDTH, umt5

NAME = "tiny_umt5.safetensors"
RED, BLUE, BAD = "a red (striped:1.3) shirt", "a blue shirt walks", "old bridge"
E4 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A one-layer umT5 file that passes for the real one: ComfyUI goes by one tensor's shape."""
    state, options = umt5()
    state[MARKER] = torch.zeros(MARKER_SHAPE, dtype=E4)
    path = tmp_path_factory.mktemp("encoder") / NAME
    save_file(state, path)
    return path, options


@pytest.fixture
def encoder(tiny, tmp_path, monkeypatch):
    """The file in models/text_encoders, a fresh cache, and a list of what was loaded."""
    import folder_paths

    path, options = tiny
    folder, user, loads = tmp_path / "text_encoders", tmp_path / "user", []
    folder.mkdir()
    os.link(path, folder / NAME)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(user))
    monkeypatch.setattr("frugal.nodes.text.cached_encode.show_text", lambda *_: None)
    monkeypatch.setattr(cached_encode_run, "LAYERS", LAYERS)
    monkeypatch.setattr(cached_encode_run, "VOCABULARY", (PIECES, WIDTH))
    load = comfy.sd.load_clip

    def load_tiny(*arguments, **named):
        loads.append(named)
        named["model_options"] = named.get("model_options", {}) | options
        return load(*arguments, **named)

    monkeypatch.setattr(comfy.sd, "load_clip", load_tiny)
    yield folder / NAME, loads
    folder_paths.filename_list_cache.pop("text_encoders", None)


def run(positive=RED, negative=BAD, device="default"):
    node = FrugalCachedTextEncode.PREPARE_CLASS_CLONE({})
    with torch.inference_mode():
        return node.execute(NAME, positive, negative, device).args


def by_stock_nodes(text):
    with torch.inference_mode():
        clip = stock.CLIPLoader().load_clip(NAME, "wan")[0]
        return stock.CLIPTextEncode().encode(clip, text)[0]


def same(one, other) -> bool:
    if len(one) != len(other):
        return False
    for (a, extra), (b, more) in zip(one, other, strict=True):
        if a.dtype != b.dtype or not torch.equal(a, b) or list(extra) != list(more):
            return False
        for key, value in extra.items():
            equal = torch.equal(value, more[key]) if torch.is_tensor(value) else value == more[key]
            if not equal:
                return False
    return True


def entries():
    return sorted(cached_encode_run.cache_folder().iterdir())


def test_bit_for_bit_what_the_stock_nodes_give(encoder):
    _, loads = encoder
    red, bad = by_stock_nodes(RED), by_stock_nodes(BAD)
    loads.clear()
    positive, negative, report = run()
    assert len(loads) == 1 and len(entries()) == 2
    assert "positive: new, encoded in" in report and "negative: new" in report
    again = run()
    assert len(loads) == 1, "the encoder was read for prompts in the cache"
    assert again[2].count("from the cache (") == 2
    for found in ((positive, negative), again[:2]):
        assert same(found[0], red) and same(found[1], bad)
    assert positive[0][0].shape == (1, 512, WIDTH) and not same(red, bad)


def test_only_the_new_prompt_is_encoded_and_twins_once(encoder):
    _, loads = encoder
    run(RED, BAD)
    *_, report = run(BLUE, BAD)
    assert len(loads) == 2 and "negative: from the cache" in report
    positive, negative, _ = run("person", "person")
    assert same(positive, negative) and len(loads) == 3 and len(entries()) == 4


@pytest.mark.parametrize("change", ["dtype", "torch", "device", "comfyui", "attention", "fast"])
def test_another_computation_is_another_entry(encoder, monkeypatch, change):
    _, loads = encoder
    run()
    computation = cached_encode_run.computation
    monkeypatch.setattr(
        cached_encode_run, "computation", lambda d: computation(d) | {change: "other"}
    )
    assert change in computation("default")
    run()
    assert len(loads) == 2 and len(entries()) == 4


def test_another_encoder_file_is_another_entry(encoder):
    path, loads = encoder
    run()
    before = cached_encode_run.fingerprint(NAME)
    state = path.stat()
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    # The same size and time, other weights: in place of the hard link, which others use.
    data = bytearray(copy.read_bytes())
    # The first byte after the header: the last bit of one weight.
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    copy.write_bytes(data)
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(copy, path)
    assert cached_encode_run.fingerprint(NAME) == before
    run()
    assert len(loads) == 2
    os.utime(path, ns=(1, 1))
    run()
    assert len(loads) == 3 and cached_encode_run.fingerprint(NAME) != before


def test_a_damaged_entry_is_encoded_again(encoder):
    _, loads = encoder
    first = run()
    for path in entries():
        path.write_bytes(path.read_bytes()[:200])
    second = run()
    assert len(loads) == 2 and second[2].count("damaged in the cache, encoded in") == 2
    assert same(first[0], second[0]) and run()[2].count("from the cache") == 2
    assert not [path for path in entries() if path.suffix != ".safetensors"]


def test_a_full_disk_costs_only_the_cache(encoder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cached_encode_run, "write_text_embeds", full)
    positive, _, report = run()
    assert report.count("not kept (No space left on device)") == 2 and not entries()
    monkeypatch.undo()
    assert torch.isfinite(positive[0][0]).all()


def test_embedding_files_are_never_kept(encoder):
    _, loads = encoder
    for count in (1, 2):
        *_, report = run("embedding:mine shirt", "embedding:mine shirt")
        assert len(loads) == count and "names an embedding file, so never kept" in report
    assert not entries()


def test_the_cache_drops_what_was_used_longest_ago(encoder, monkeypatch):
    run(RED, BAD)
    # The first two grow old, then one of them is used.
    for path in entries():
        os.utime(path, ns=(10**9, 10**9))
    run(RED, RED)
    size = entries()[0].stat().st_size
    monkeypatch.setattr(cached_encode_run, "LARGEST_CACHE", 2 * size + size // 2)
    stranger = cached_encode_run.cache_folder() / "mine.safetensors"
    stranger.write_bytes(b"x" * size)
    os.utime(stranger, ns=(1, 1))
    run(BLUE, RED)
    assert stranger.is_file() and len(entries()) == 3
    assert run(RED, BLUE)[2].count("from the cache") == 2
    assert "new, encoded" in run(BAD, BAD)[2]


def test_device_cpu_is_an_entry_of_its_own_where_it_differs(encoder, monkeypatch):
    _, loads = encoder
    run(device="cpu")
    assert loads[-1]["model_options"]["load_device"] == torch.device("cpu")
    monkeypatch.setattr(
        cached_encode_run.comfy.model_management,
        "text_encoder_device",
        lambda: torch.device("meta"),
    )
    gpu, cpu = cached_encode_run.computation("default"), cached_encode_run.computation("cpu")
    assert (gpu["device"], cpu["device"]) == ("meta", "cpu")


@pytest.fixture
def small(monkeypatch):
    """Shapes that a header-only file can have."""
    monkeypatch.setattr(cached_encode_run, "VOCABULARY", (4, 2))
    monkeypatch.setattr(cached_encode_run, "TELLING_ROWS", 2)


def header_file(path, metadata=None, **tensors):
    names = [
        f"encoder.block.{layer}.{part}.weight"
        for layer in range(24)
        for part in cached_encode_run.LAYER_PARTS
    ]
    state = {name: torch.zeros(2, 2) for name in names}
    state |= {
        cached_encode_run.EMBEDDING: torch.zeros(4, 2),
        cached_encode_run.FINAL_NORM: torch.zeros(2),
    }
    state |= {cached_encode_run.TOKENIZER: torch.zeros(2, dtype=torch.uint8)} | tensors
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata)
    return path


QUANT = {"a.weight": torch.zeros(2, dtype=E4)}
DECLARED = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})}
REFUSED = {
    "release naming": ({"token_embedding.weight": torch.zeros(2)}, None, "Wan's own release"),
    "no tokenizer": ({"spiece_model": None}, None, "lacks spiece_model and 0 more"),
    "T5-XXL, not umT5": (
        {f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": None
         for i in range(1, 24)},
        None, r"lacks encoder.block.1.layer.0.SelfAttention.relative.* and 22 more",
    ),
    "cut short": ({"encoder.final_layer_norm.weight": None}, None, "lacks encoder.final_layer_n"),
    "another vocabulary": ({"shared.weight": torch.zeros(3, 2)}, None, r"weight as \[3, 2\]"),
    "another width": (
        {cached_encode_run.TELLING: torch.zeros(3, 2)}, None, r"as \[3, 2\]; expected",
    ),
    "scale_weight bare": (
        QUANT | {"a.scale_weight": torch.ones(1)}, None, "scale_weight tensors that nothing",
    ),
    "weight_scale bare": (
        QUANT | {"a.weight_scale": torch.ones(1)}, None, "weight_scale tensors that nothing",
    ),
    "e5m2": (
        {
            "a.weight": torch.zeros(2, dtype=torch.float8_e5m2), "a.scale_weight": torch.ones(1),
            "scaled_fp8": torch.zeros(2, dtype=torch.float8_e5m2),
        },
        None, "1 scaled weights in e5m2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_would_be_read_wrongly_are_refused(case, small, tmp_path):
    tensors, metadata, words = REFUSED[case]
    path = header_file(tmp_path / "encoder.safetensors", metadata, **tensors)
    with pytest.raises(FrugalError, match=words):
        cached_encode_run.check_encoder(path)


def test_files_that_are_read_correctly_pass(small, tmp_path):
    path = tmp_path / "encoder.safetensors"
    cached_encode_run.check_encoder(header_file(path))
    marked = {"a.scale_weight": torch.ones(1), "scaled_fp8": torch.zeros(0, dtype=E4)}
    cached_encode_run.check_encoder(header_file(path, **QUANT, **marked))
    cached_encode_run.check_encoder(header_file(path, **QUANT))
    newer = QUANT | {"a.weight_scale": torch.ones(1)}
    layer = newer | {"a.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    for tensors, metadata in ((newer, DECLARED), (layer, None)):
        header_file(path, metadata, **tensors)
        if hasattr(comfy.utils, "detect_layer_quantization"):
            cached_encode_run.check_encoder(path)
        else:
            with pytest.raises(FrugalError, match="in the newer way"):
                cached_encode_run.check_encoder(path)


def test_what_comfyui_took_for_another_encoder_is_refused(encoder, monkeypatch):
    other = torch.nn.Module()
    clip = type("Clip", (), {"cond_stage_model": other})
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **_: clip)
    with pytest.raises(FrugalError, match=r"took tiny_umt5.* for Module"):
        run()
    assert not entries()


def test_a_missing_or_damaged_file_is_refused(encoder):
    path, loads = encoder
    with pytest.raises(FrugalError, match=r"gone\.safetensors is not there"):
        cached_encode_run.encoder_path("gone.safetensors")
    path.unlink()
    path.write_bytes(b"nothing")
    with pytest.raises(FrugalError):
        run()
    assert not loads and not entries()
