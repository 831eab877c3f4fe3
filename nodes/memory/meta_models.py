"""Wan models and VAEs without memory: built again on torch's meta device and traced there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import torch

from ...kernels.checkpoints.wan_shapes import IMAGE_DIM, IMAGE_TOKENS, TEXT_DIM, TEXT_TOKENS
from ...kernels.errors import FrugalError
from ...kernels.memory.plan import Job, MemoryOptions, latent_bytes
from ...kernels.memory.trace import (
    BLOCK,
    Decomposed,
    Fused,
    Trace,
    fused_attention,
    fused_norm,
    of_layers,
    trace,
)
from .._comfy import ATTENTION_OVERRIDE, compute_dtype
from . import doctor_run
from .chunked_blocks import PARTS, ActiveOptions, forwards
from .without_memory import MetaOps, without_memory

META = torch.device("meta")
KNOWN = ("WanModel", "VaceWanModel", "CameraWanModel")
# ComfyUI's own causal class; it can be planned once this pack's causal run keeps the cache.
CAUSAL = ("CausalWanModel",)
ROTATION = "comfy_kitchen::apply_rope1"
# Latent pixels of a 256 px tile; latent frames until a VAE's caches are full; those traced at most.
TILE, STREAM, LONGEST = 32, 5, 21


def check(model: Any, causal: bool = False) -> None:
    """Raises FrugalError unless `model` (of a MODEL) is a Wan that can be planned."""
    name = type(model.diffusion_model).__name__
    if name in CAUSAL and not causal:
        raise FrugalError(
            f"the MODEL is a {type(model).__name__} ({name}) for ComfyUI's own causal sampler",
            "one whose cache is known",
            "put Causal Model between the loader and Memory Plan",
        )
    known = (*KNOWN, *CAUSAL)
    if name not in known or not isinstance(model.diffusion_model, comfy.ldm.wan.model.WanModel):
        raise FrugalError(
            f"the MODEL is a {type(model).__name__} ({name})",
            "a Wan 2.1 or 2.2 text-to-video, image-to-video, VACE or camera model",
            "connect a Wan model, or leave Memory Plan out of this graph",
        )


class ForwardPeaks:
    """Bytes alive in one forward of a Wan, traced on a model of its shape and remembered.

    device: for which kernels to count.
    """

    def __init__(self, model: Any, device: torch.device, causal: bool = False):
        check(model, causal)
        self._class = type(model.diffusion_model)
        self._config = dict(model.model_config.unet_config)
        self._dtype = compute_dtype(model)
        self._layers = len(model.diffusion_model.blocks)
        self._kernels = kernels(device)
        self._known: dict[Any, int] = {}

    def of(self, batch: int, latent: tuple[int, ...], memory_options: MemoryOptions) -> int:
        """Peak in bytes. batch: rows of the forward, both conditions counted; latent: T, H, W."""
        key = batch, tuple(latent), memory_options.pieces, memory_options.attention
        if key not in self._known:
            self._known[key] = of_layers(self.trace(3, batch, latent, memory_options), self._layers)
        return self._known[key]

    def beside(self, batch: int, latent: tuple[int, ...]) -> int:
        """Bytes that a run of `batch` latents T, H, W holds beside its forwards and weights."""
        return latent_bytes(batch, latent)

    def begin(self, shape: tuple[int, ...], transformer_options: dict[str, Any]) -> None:
        """A run of latents of this shape, [B, C, T, H, W], starts with these options."""

    def prepare(self, model: Any, batch: int, latent: tuple[int, ...]) -> None:
        """Put in place what else changes a forward of `model`, which is without memory."""

    def of_job(self, job: Job, memory_options: MemoryOptions) -> int:
        """Peak in bytes of the forwards of a job under `memory_options`."""
        rows = job.batch * (2 if job.guided and not memory_options.sequential else 1)
        return self.of(rows, job.latent, memory_options)

    def trace(
        self, layers: int, batch: int, latent: tuple[int, ...], memory_options: MemoryOptions
    ) -> Trace:
        """The trace of a model of so many layers."""
        model = self.model(layers, memory_options)
        self.prepare(model, batch, latent)
        parts = {BLOCK.format(index): block for index, block in enumerate(model.blocks)}
        for index, block in enumerate(model.blocks):
            parts |= {f"{name} {index}": getattr(block, name) for name in PARTS}
        decomposed, fused = self._kernels
        arguments = inputs(model, batch, latent, self._dtype, META)
        return trace(lambda: model(**arguments()), parts, decomposed, fused)

    def model(self, layers: int, memory_options: MemoryOptions) -> Any:
        """A Wan like this one without memory, of so many layers, working under `memory_options`."""
        changed = {"num_layers": layers, "dtype": self._dtype}
        if "vace_layers" in self._config:
            changed["vace_layers"] = 1
        model = self._class(**{**self._config, **changed}, device=META, operations=MetaOps)
        state = ActiveOptions.of(memory_options)

        def original(path: str) -> Callable[..., Any]:
            return model.get_submodule(path.rpartition(".")[0]).forward

        for path, forward in list(forwards(model, state, original)):
            model.get_submodule(path.rpartition(".")[0]).forward = forward
        return model


def inputs(
    model: Any, batch: int, latent: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], dict[str, Any]]:
    """Makes the arguments of a forward of `model`: zeros, so that no memory is what is missing."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def make() -> dict[str, Any]:
        found = {
            "x": zeros(batch, model.in_dim, *latent),
            "timestep": torch.zeros(batch, device=device),
            "context": zeros(batch, TEXT_TOKENS, TEXT_DIM),
            "transformer_options": {ATTENTION_OVERRIDE: _fused_override},
        }
        if model.img_emb is not None:
            found["clip_fea"] = zeros(batch, IMAGE_TOKENS, IMAGE_DIM)
        if hasattr(model, "vace_patch_embedding"):
            width = model.vace_patch_embedding.weight.shape[1]
            found["vace_context"] = zeros(batch, 1, width, *latent)
            found["vace_strength"] = [1.0]
        return found

    return make


def _fused_override(_: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_like(q)


def kernels(device: torch.device) -> tuple[Decomposed, Fused]:
    """Which operations make more than their result on `device`, and which do not."""
    fused: dict[Any, Any] = {torch.nn.functional.scaled_dot_product_attention: fused_attention}
    # From torch 2.9 on a kernel on NVIDIA and AMD cards; elsewhere made of smaller operations.
    if device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm"):
        fused[torch.nn.functional.rms_norm] = fused_norm
    eager = doctor_run.eager_rotation(device)
    return ({} if eager is None else {ROTATION: eager}), fused


def decoded(vae: Any, latent: tuple[int, ...]) -> tuple[int, int, int, str]:
    """Bytes that a decode of T, H, W latents has alive: whole, in a stream, in 256 px tiles; and
    how they are known.
    """
    model = getattr(vae, "first_stage_model", None)
    frames, height, width = latent
    tile = frames, min(TILE, height), min(TILE, width)
    channels = vae.latent_channels
    if isinstance(model, comfy.ldm.wan.vae.WanVAE):
        light = light_vae(model)
        short = min(frames, LONGEST)
        whole, stream = (
            decode_peak(light, channels, (count, height, width), vae.vae_dtype)
            for count in (short, min(frames, STREAM))
        )
        # Frames are there twice while they are joined to a video, latents before and after a layer.
        each = 2 * (4 * 3 * 64 + channels) * height * width * vae.vae_dtype.itemsize
        whole += (frames - short) * each
        # Everything in a decode is in proportion to the picture.
        return whole, stream, whole * tile[1] * tile[2] // (height * width), "traced"
    whole, tiled = (
        int(vae.memory_used_decode((1, channels, *shape), vae.vae_dtype))
        for shape in (latent, tile)
    )
    return whole, whole, tiled, "ComfyUI's estimate"


def light_vae(model: torch.nn.Module) -> Any:
    """A copy of a Wan VAE without memory."""
    light = without_memory(model)
    for module in light.modules():
        # Its attention asks a device how much it may take, which this one cannot say.
        if hasattr(module, "optimized_attention"):
            module.optimized_attention = _attention_of_vae
    return light


def _attention_of_vae(q: torch.Tensor, k: Any, v: Any) -> torch.Tensor:
    return torch.empty_like(q)


def decode_peak(model: Any, channels: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes alive in a decode of T, H, W latents by a VAE without memory."""

    def call() -> Any:
        return model.decode(torch.zeros((1, channels, *shape), dtype=dtype, device=META))

    return trace(call, fused=kernels(META)[1]).peak
