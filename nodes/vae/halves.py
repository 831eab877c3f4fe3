"""The two halves of ComfyUI's Wan VAE as functions of a piece of a clip and a state."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...kernels.errors import FrugalError
from ...kernels.video.cadence import Cadence, Call, observe

STATE = {"feat_cache", "feat_idx"}
# ComfyUI's estimates rise up to here and then stay, whatever the length of the clip.
ENOUGH_FRAMES = 5


@dataclass(frozen=True)
class Half:
    """One direction of a VAE for a clip of known length.

    run(piece [1, C, t, H, W] on the device, state, call) -> a tensor of the same kind, or None
    where the network waits for more; it replaces the entries of `state` and changes no tensor.
    around: the pointwise convolution before (decoder) or behind (encoder) the network, for all
    frames at once. seen: what the user gets of a piece that `run` returned, as pixels from 0 to 1
    or as latents. memory, first_memory: bytes that ComfyUI estimates for a chunk of this size and
    for a single frame. scale: pixels per latent pixel. takes: what goes in, in a word.
    """

    cadence: Cadence
    run: Callable[[torch.Tensor, Any, Call], torch.Tensor | None]
    around: Callable[[torch.Tensor], torch.Tensor]
    seen: Callable[[torch.Tensor], torch.Tensor]
    memory: int
    first_memory: int
    scale: int
    takes: str

    def fresh_state(self) -> Any:
        return [None] * self.cadence.slots or None


def decoder_of(vae: Any, frames: int, height: int, width: int) -> Half:
    """The decoder for `frames` latents of height x width latent pixels. Raises FrugalError for a
    VAE that is not Wan's, and for a ComfyUI whose loop cannot be followed.
    """
    model = wan_decoder(vae)
    cadence = observe(model, "decode", "decoder", frames)
    unfold = _patching(model, "unpatchify", cadence)

    def run(piece: torch.Tensor, state: Any, call: Call) -> torch.Tensor:
        made = model.decoder(piece, feat_cache=state, feat_idx=[0], **call.flags)
        return unfold(torch.cat(made, 2) if isinstance(made, list) else made)

    def seen(piece: torch.Tensor) -> torch.Tensor:
        # Newer ComfyUI changes the range in place, in the type of its result.
        return vae.process_output(piece.to(output_dtype(vae), copy=True))

    def memory(count: int) -> int:
        shape = (1, vae.latent_channels, count, height, width)
        return int(vae.memory_used_decode(shape, vae.vae_dtype))

    needed = memory(min(frames, ENOUGH_FRAMES)), memory(1)
    return Half(
        cadence, run, model.conv2, seen, *needed, vae.spacial_compression_decode(), "latent"
    )


def encoder_of(vae: Any, frames: int, height: int, width: int) -> Half:
    """The encoder for `frames` pictures of height x width latent pixels; errors as `decoder_of`."""
    model = wan_encoder(vae)
    cadence = observe(model, "encode", "encoder", frames)
    fold = _patching(model, "patchify", cadence)
    scale = vae.spacial_compression_encode()

    def run(piece: torch.Tensor, state: Any, call: Call) -> torch.Tensor | None:
        return model.encoder(fold(piece), feat_cache=state, feat_idx=[0], **call.flags)

    def around(x: torch.Tensor) -> torch.Tensor:
        return model.conv1(x).chunk(2, dim=1)[0]

    def seen(piece: torch.Tensor) -> torch.Tensor:
        with on_device(vae):
            latents = around(piece.to(vae.device)).to(vae.output_device)
        return latents.to(output_dtype(vae))

    def memory(count: int) -> int:
        shape = (1, 3, count, height * scale, width * scale)
        return int(vae.memory_used_encode(shape, vae.vae_dtype))

    needed = memory(min(frames, ENOUGH_FRAMES)), memory(1)
    return Half(cadence, run, around, seen, *needed, scale, "frame")


def wan_decoder(vae: Any) -> Any:
    """The model, if its decoder keeps a state between frames; FrugalError if not."""
    return _wan(vae, "decoder", "conv2", "VAE Decode")


def wan_encoder(vae: Any) -> Any:
    """The model, if its encoder keeps a state between frames; FrugalError if not."""
    return _wan(vae, "encoder", "conv1", "VAE Encode")


def _wan(vae: Any, part: str, around: str, instead: str) -> Any:
    model = getattr(vae, "first_stage_model", None)
    network = getattr(model, part, None)
    known = network is not None and set(inspect.signature(network.forward).parameters)
    if not known or not known >= STATE or not hasattr(model, around):
        raise FrugalError(
            f"the VAE is a {type(model).__name__}, which keeps no state between frames",
            "the VAE of Wan 2.1 or 2.2",
            f"use ComfyUI's own '{instead}'",
        )
    return model


def _patching(model: Any, name: str, cadence: Cadence) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wan 2.2 folds 2 x 2 pixels into channels, by a function beside its class."""
    if cadence.patch == 1:
        return lambda x: x
    function = getattr(sys.modules[type(model).__module__], name, None)
    if function is None:
        raise FrugalError(
            f"the VAE folds {cadence.patch} x {cadence.patch} pixels by an unknown function",
            f"a function {name}",
            "use ComfyUI's own VAE nodes, and report the version of ComfyUI",
        )
    return lambda x: function(x, patch_size=cadence.patch)


def output_dtype(vae: Any) -> torch.dtype:
    """The type in which the VAE's own methods return pictures and latents."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32


def on_device(vae: Any) -> Any:
    """The context in which newer ComfyUI runs a VAE on a card other than the first."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return context(vae.device) if context else contextlib.nullcontext()
