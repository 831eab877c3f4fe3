"""Text embeddings by what they were made from: the encoder is loaded only for a new prompt.

An entry's name is a hash of all that the numbers depend on: the encoder file, how it computes (data
type, device, versions) and the prompt. So an entry is either what encoding would give here and now,
or it is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...kernels.checkpoints.header import read_header
from ...kernels.checkpoints.text_embeds import read_text_embeds, write_text_embeds
from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.report import megabytes
from .._models import file_path, state_of

FOLDER, SUFFIX = "text_encoders", ".safetensors"
DEVICES = ("default", "cpu")
CACHE = "frugal_text_embeds"
LARGEST_CACHE = 2 * 10**9
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
# Changes when entries of older versions must not be used any more.
VERSION = 1
SAMPLES, SAMPLE = 16, 1 << 16
# umT5-XXL's encoder (arXiv 2010.11934, its 2023 release) as ComfyUI's repackaged files name it.
LAYERS, VOCABULARY = 24, (256384, 4096)
EMBEDDING, FINAL_NORM = "shared.weight", "encoder.final_layer_norm.weight"
LAYER_PARTS = (
    *(f"layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o", "relative_attention_bias")),
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    "layer.0.layer_norm",
    "layer.1.layer_norm",
)
# What ComfyUI tells a T5-XXL by, and what its model is then called inside.
TELLING, TELLING_ROWS, MODEL = (
    "encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
    10240,
    "umt5xxl",
)
RELEASE_NAME, TOKENIZER, MARKER = "token_embedding.weight", "spiece_model", "scaled_fp8"
KNOWN_GOOD = "use umt5_xxl_fp8_e4m3fn_scaled.safetensors or umt5_xxl_fp16.safetensors"


@dataclass(frozen=True)
class Entry:
    """One prompt: its conditioning and a line about where it came from."""

    conditioning: list[list[Any]]
    source: str


def names() -> list[str]:
    """Encoder files to choose from."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]


def encoder_path(name: str) -> Path:
    """The full path of a chosen file. Raises FrugalError if it is gone."""
    return file_path(FOLDER, name)


def fingerprint(name: str) -> str:
    """Changes when the file is replaced."""
    return state_of(encoder_path(name))


def cache_folder() -> Path:
    """Where entries lie; made if absent."""
    folder = Path(folder_paths.get_user_directory()) / CACHE
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def encode(path: Path, texts: list[str], device: str) -> list[Entry]:
    """The conditioning of each text by ComfyUI's own Wan text encoder in `path`, from the cache
    where it has it. device: one of DEVICES.

    Raises FrugalError, before the encoder is read, if the file is no umT5-XXL for ComfyUI.
    """
    check_encoder(path)
    maker = identity(path) | computation(device)
    found: dict[str, Entry] = {}
    missing = []
    for text in dict.fromkeys(texts):
        entry, why = _read(maker, text)
        if entry is None:
            missing.append((text, why))
        else:
            found[text] = entry
    if missing:
        clip = load_encoder(path, device)
        for text, why in missing:
            found[text] = _make(clip, maker, text, why)
        _prune(cache_folder())
    return [found[text] for text in texts]


def check_encoder(path: Path) -> None:
    """Raises FrugalError if the header is not that of an umT5-XXL encoder that this ComfyUI reads
    correctly: it drops scales that it does not know, silently.
    """
    header = read_header(path)
    leaves = {name.rpartition(".")[2] for name in header.tensors}
    if RELEASE_NAME in header.tensors:
        raise FrugalError(
            f"{path.name} is an umT5 encoder in the naming of Wan's own release",
            "one in the naming of ComfyUI's repackaged files, with its tokenizer",
            KNOWN_GOOD,
        )
    wanted = [
        TOKENIZER,
        TELLING,
        EMBEDDING,
        FINAL_NORM,
        *(f"encoder.block.{i}.{part}.weight" for i in range(LAYERS) for part in LAYER_PARTS),
    ]
    missing = [name for name in wanted if name not in header.tensors]
    if missing:
        raise FrugalError(
            f"{path.name} lacks {missing[0]} and {len(missing) - 1} more",
            f"the {len(wanted)} tensors of an umT5-XXL encoder with its tokenizer",
            KNOWN_GOOD,
        )
    shapes = {name: header.tensors[name].shape for name in (EMBEDDING, TELLING)}
    if shapes[EMBEDDING] != VOCABULARY or shapes[TELLING][:1] != (TELLING_ROWS,):
        raise FrugalError(
            f"{path.name} holds {EMBEDDING} as {list(shapes[EMBEDDING])} and {TELLING} as "
            f"{list(shapes[TELLING])}",
            f"{list(VOCABULARY)} and {TELLING_ROWS} rows",
            KNOWN_GOOD,
        )
    declared = "comfy_quant" in leaves or "_quantization_metadata" in header.metadata
    if declared and not hasattr(comfy.utils, "detect_layer_quantization"):
        raise FrugalError(
            f"{path.name} declares its quantised layers in the newer way",
            "a text encoder that this ComfyUI reads",
            f"update ComfyUI, or {KNOWN_GOOD}",
        )
    old = "scale_weight" in leaves
    if (old and MARKER not in header.tensors) or ("weight_scale" in leaves and not declared):
        raise FrugalError(
            f"{path.name} has {'scale_weight' if old else 'weight_scale'} tensors that nothing "
            "declares",
            "a quantised encoder that ComfyUI reads",
            KNOWN_GOOD,
        )
    e5m2 = [
        name
        for name, info in header.tensors.items()
        if info.dtype == torch.float8_e5m2 and name != MARKER
    ]
    if e5m2 and (old or declared):
        raise FrugalError(
            f"{path.name} holds {len(e5m2)} scaled weights in e5m2", "fp8 e4m3", KNOWN_GOOD
        )


def identity(path: Path) -> dict[str, Any]:
    """What tells one encoder file from another: name, size, time, header, and samples of the
    content (16 x 64 KiB).
    """
    state = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(length))
        start = 8 + length
        for index in range(SAMPLES):
            file.seek(start + max(0, state.st_size - start - SAMPLE) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return {
        "file": path.name,
        "size": state.st_size,
        "time": state.st_mtime_ns,
        "content": digest.hexdigest(),
    }


def computation(device: str) -> dict[str, Any]:
    """What else the numbers depend on: device, data type, attention, fast switches, versions."""
    management = comfy.model_management
    place = management.text_encoder_device() if device == "default" else torch.device("cpu")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    try:
        from comfyui_version import __version__ as comfyui
    except ImportError:
        comfyui = "unknown"
    return {
        "version": VERSION,
        "device": name,
        "dtype": str(management.text_encoder_dtype(place)),
        "attention": getattr(comfy.ldm.modules.attention.optimized_attention, "__name__", ""),
        "fast": sorted(str(each) for each in getattr(comfy.cli_args.args, "fast", None) or ()),
        "torch": torch.__version__,
        "comfyui": comfyui,
    }


def load_encoder(path: Path, device: str) -> Any:
    """ComfyUI's own loader, as CLIPLoader of type wan calls it. Raises FrugalError if it made
    another encoder of the file.
    """
    options = {}
    if device != "default":
        options = dict.fromkeys(("load_device", "offload_device"), torch.device(device))
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.WAN,
        model_options=options,
    )
    if not hasattr(clip.cond_stage_model, MODEL):
        raise FrugalError(
            f"ComfyUI took {path.name} for {type(clip.cond_stage_model).__name__}",
            "an umT5-XXL encoder",
            KNOWN_GOOD,
        )
    return clip


def _entry_path(maker: dict[str, Any], text: str) -> Path:
    said = json.dumps(maker | {"text": text}, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(said.encode()).hexdigest()}{SUFFIX}"


def _cacheable(text: str) -> bool:
    # Such a word stands for a file of its own, which may change.
    return "embedding:" not in text


def _read(maker: dict[str, Any], text: str) -> tuple[Entry | None, str]:
    """The entry, or None and why there is none."""
    if not _cacheable(text):
        return None, "names an embedding file, so never kept"
    path = _entry_path(maker, text)
    if not path.is_file():
        return None, "new"
    try:
        conditioning = read_text_embeds(path)
    except (FrugalError, OSError) as error:
        LOG.warning("[Frugal] a text embedding in the cache is damaged: %s", error)
        return None, "damaged in the cache"
    # The order of last use is what pruning goes by.
    os.utime(path)
    return Entry(conditioning, f"from the cache ({megabytes(path.stat().st_size)})"), ""


def _make(clip: Any, maker: dict[str, Any], text: str, why: str) -> Entry:
    started = time.perf_counter()
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    source = f"{why}, encoded in {time.perf_counter() - started:.2f} s"
    if not _cacheable(text):
        return Entry(conditioning, source)
    path = _entry_path(maker, text)
    try:
        write_text_embeds(conditioning, path)
    except OSError as error:
        LOG.warning("[Frugal] a text embedding could not be kept: %s", error)
        return Entry(conditioning, f"{source}, not kept ({error.strerror or 'write failed'})")
    return Entry(conditioning, f"{source}, kept ({megabytes(path.stat().st_size)})")


def _prune(folder: Path) -> None:
    """Drop the entries used longest ago until the cache holds at most LARGEST_CACHE bytes."""
    entries = [
        (state.st_mtime_ns, state.st_size, file)
        for file in folder.iterdir()
        if ENTRY.fullmatch(file.name) and (state := file.stat())
    ]
    held = sum(size for _, size, _ in entries)
    for _, size, file in sorted(entries):
        if held <= LARGEST_CACHE:
            return
        file.unlink(missing_ok=True)
        held -= size
