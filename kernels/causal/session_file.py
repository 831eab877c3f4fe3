"""A video's cache as a safetensors file: pages as they are, to the bit, and clean latents."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import json_text
from ..errors import FrugalError
from ..tensor_file import write_tensors
from .cache import CachedFrame, VideoCache
from .offload import HOST, to_device
from .options import CacheOptions
from .storage import Page, PageFormat

FORMAT = "frugal causal session 1"


def save(cache: VideoCache, path: Path) -> None:
    """Write under a temporary name, then rename. Raises FrugalError for a cache without frames."""
    if not cache.kept:
        raise FrugalError(
            "a session without frames",
            "one that a sampler kept",
            "turn keep_session on in the sampler and run it again",
        )
    tensors: dict[str, torch.Tensor] = {}
    for number, stream in cache.streams.items():
        for frame, pages in stream.items():
            for layer, page in enumerate(pages):
                held = to_device(cache.pool.read(page), HOST)
                for name, tensor in held.tensors().items():
                    tensors[f"{number}.{frame}.{layer}.{name}"] = tensor
    for frame, latent in cache.clean.items():
        tensors[f"clean.{frame}"] = latent.to(HOST).contiguous()
    facts = {
        "shape": cache.fmt.shape,
        "dtype": str(cache.fmt.dtype).removeprefix("torch."),
        "layers": cache.layers,
        "options": asdict(cache.options),
        "kept": [asdict(each) for each in cache.kept],
        "streams": sorted(cache.streams),
        "next_frame": cache.next_frame,
        "blocks_made": cache.blocks_made,
        "error": cache.error,
        "prompt": cache.prompt,
        "weights": cache.weights,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"format": FORMAT, "session": json.dumps(facts)})


def load(path: Path, device: torch.device) -> VideoCache:
    """The video's cache, its pages in main memory until a run fetches them. device: where attention
    will run. Raises FrugalError for another file, or one with parts missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FrugalError(
                    f"{path.name} is no session of this version", FORMAT, "choose another file"
                )
            return _restored(json_text.parse(metadata["session"]), file, device)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FrugalError):
            raise
        reason = ascii(str(error))[1:-1][:120]
        raise FrugalError(
            f"{path.name} cannot be read ({reason})",
            "a whole session file",
            "save the session again",
        ) from error


DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def _count(facts: dict, name: str, least: int = 0) -> int:
    value = facts[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {ascii(value)[:40]}")
    return value


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # fp8 pages have no infinity, and their scales are looked at.
    if tensor.is_floating_point() and tensor.itemsize > 1 and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite")
    return tensor


def _kept(entries: list) -> list[CachedFrame]:
    kept = [CachedFrame(**each) for each in entries]
    numbers = [number for each in kept for number in (each.frame, each.position, each.block)]
    if not kept or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("frames without numbers")
    frames = [each.frame for each in kept]
    if sorted(set(frames)) != frames:
        raise ValueError("frames out of order")
    return kept


def _restored(facts: dict, file, device: torch.device) -> VideoCache:
    options = CacheOptions(**facts["options"])
    shape = tuple(facts["shape"])
    if len(shape) != 4 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"pages of shape {ascii(shape)[:60]}")
    fmt = PageFormat(shape, DTYPES[facts["dtype"]], options.kind)
    _count(facts, "layers", 1)
    cache = VideoCache(fmt, facts["layers"], device, options)
    wanted = fmt.empty(torch.device("meta")).tensors()
    cache.kept = _kept(facts["kept"])
    for number in facts["streams"]:
        for each in cache.kept:
            contents = []
            for layer in range(cache.layers):
                prefix = f"{number}.{each.frame}.{layer}."
                held = {name: file.get_tensor(prefix + name) for name in wanted}
                for name, tensor in held.items():
                    if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
                        raise KeyError(f"{prefix}{name} is {tuple(tensor.shape)} {tensor.dtype}")
                    _finite(f"{prefix}{name}", tensor)
                contents.append(Page(**held))
            pages = cache.pool.adopt(contents, away=not options.on_host)
            cache.streams.setdefault(number, {})[each.frame] = pages
    clean = {each.frame: file.get_tensor(f"clean.{each.frame}") for each in cache.kept}
    if len({(tensor.shape, tensor.dtype) for tensor in clean.values()}) != 1:
        raise ValueError("clean latents of different shapes")
    cache.clean = {frame: _finite(f"clean.{frame}", tensor) for frame, tensor in clean.items()}
    cache.next_frame = _count(facts, "next_frame", cache.kept[-1].frame + 1)
    cache.blocks_made = _count(facts, "blocks_made")
    cache.error, cache.prompt = facts["error"], facts["prompt"]
    cache.weights = {name: str(facts["weights"][name]) for name in facts.get("weights", ())}
    return cache
