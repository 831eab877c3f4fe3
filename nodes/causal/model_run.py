"""A stock Wan 2.1 model that is made block by block: each self-attention sees the frames before.

The self-attention keeps its own forward, with whatever patches and LoRAs it has. What is replaced
is the attention call inside it, through ComfyUI's own override: the block's keys and values are
joined with those in the cache. Nothing of a block or of the network is rewritten, so that both
this ComfyUI's causal class and the stock one serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.model as wan
import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.causal.options import CacheOptions
from ...kernels.causal.paged_attention import forecast
from ...kernels.causal.staging import STAGED_LAYERS
from ...kernels.causal.storage import PATCH_SIZE, PageFormat, wan_page
from ...kernels.causal.strategies import CHUNKED, PAGED
from ...kernels.errors import FrugalError
from ...kernels.memory.causal import Needs
from ...kernels.report import megabytes
from .._comfy import ATTENTION_OVERRIDE, CAUSAL_KEY, CAUSAL_NEEDS_KEY, CAUSAL_RUN_KEY

OPTIONS = CAUSAL_KEY
RUN, NEEDS = CAUSAL_RUN_KEY, CAUSAL_NEEDS_KEY


class CausalForward:
    """Stands for one self-attention's forward. layer: its number. inner: the forward it had."""

    def __init__(self, layer: int, inner: Callable[..., torch.Tensor]):
        self.layer, self.inner = layer, inner

    def __call__(self, x, *args, transformer_options=None, **kwargs):
        """Arguments and result of WanSelfAttention.forward. Raises FrugalError outside a run of the
        causal sampler, where it would see the frames to come.
        """
        options = transformer_options or {}
        run = options.get(RUN)
        if run is None:
            raise FrugalError(
                "a causal model in an ordinary sampler",
                "the causal sampler, which makes the video block by block",
                "use Causal Sampler, or the model before it was made causal",
            )
        attend = run.attention(
            self.layer, options["cond_or_uncond"], options.get(ATTENTION_OVERRIDE)
        )
        return self.inner(
            x, *args, transformer_options={**options, ATTENTION_OVERRIDE: attend}, **kwargs
        )


def make_causal(model: Any, options: CacheOptions, shift: float) -> tuple[Any, str]:
    """(clone of the ModelPatcher `model` that is causal, a text about it).

    shift: of the noise schedule, 0 to leave the model's own. Raises FrugalError for anything but
    a Wan text or image to video model.
    """
    network = model.model.diffusion_model
    _check(model, network)
    model = model.clone()
    for layer in range(len(network.blocks)):
        name = f"diffusion_model.blocks.{layer}.self_attn.forward"
        before = model.get_model_object(name)
        inner = before.inner if isinstance(before, CausalForward) else before
        model.add_object_patch(name, CausalForward(layer, inner))
    if shift:
        model.add_object_patch("model_sampling", flow(model, shift))
    model.model_options.setdefault("transformer_options", {})[OPTIONS] = options
    model.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, OPTIONS)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, OPTIONS, count_cache)
    return model, _text(network, options, compute_dtype(model), model.load_device)


def _check(model: Any, network: torch.nn.Module) -> None:
    causal = _native_causal_class()
    if type(network) not in (wan.WanModel, *causal):
        raise FrugalError(
            f"the model is a {type(network).__name__}",
            "a Wan text to video or image to video model",
            "connect one; VACE, camera and audio variants see all frames at once",
        )
    if network.ref_conv is not None or tuple(network.patch_size) != (1, PATCH_SIZE, PATCH_SIZE):
        raise FrugalError(
            "a Wan model with a reference image or other patches",
            "Wan 2.1 text to video or image to video",
            "connect another model",
        )


def _native_causal_class() -> tuple[type, ...]:
    try:
        from comfy.ldm.wan.ar_model import CausalWanModel
    except ImportError:
        return ()
    return (CausalWanModel,)


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Wan's noise schedule, its levels a plain attribute. With dynamic VRAM, ComfyUI keeps buffers
    by name for the whole model and puts them back after it exchanged the schedule: levels in a
    buffer would become the plain model's, and those of the plain model these.
    """

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("sigmas", None)
        super().set_parameters(*args, **kwargs)
        self.__dict__["sigmas"] = self._buffers.pop("sigmas")

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        if name not in self.__dict__:
            super().register_buffer(name, tensor, persistent)


def flow(model: Any, shift: float) -> Flow:
    """The schedule of a ModelPatcher's Wan model with another shift."""
    sampling = Flow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    return sampling


def compute_dtype(model: Any) -> torch.dtype:
    """In which a ModelPatcher's network computes."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def page_format(network: torch.nn.Module, shape: Any, dtype: torch.dtype, kind: str) -> PageFormat:
    """Of one latent frame of one layer. shape: of the latent, [B, C, T, h, w]."""
    return wan_page(shape, network.num_heads, network.dim, dtype, kind)


def count_cache(executor, model, noise_shape, conds, model_options=None, *args, **kwargs):
    """A PREPARE_SAMPLING wrapper: ComfyUI makes room for one block and the cache, not for a forward
    of the whole video.

    ComfyUI's estimate is linear in the frames, so the cache is counted as the frames that it is
    worth.
    """
    transformer_options = (model_options or {}).get("transformer_options", {})
    options = transformer_options.get(OPTIONS)
    if options is None or len(noise_shape) != 5:
        return executor(model, noise_shape, conds, model_options, *args, **kwargs)
    frames = noise_shape[2]
    needs = transformer_options.get(NEEDS) or Needs(
        min(frames, options.window or frames), 0, sum(1 for side in conds.values() if side)
    )
    network = model.model.diffusion_model
    fmt = page_format(network, noise_shape, compute_dtype(model), options.kind)
    kept = needs.known + frames
    if options.window:
        kept = min(kept, options.window + options.sink)
    # One layer's keys and values are gathered at a time. Of pages in main memory this layer's and
    # the next one's are on the device.
    layers = STAGED_LAYERS if options.on_host else len(network.blocks)
    layers += options.way != CHUNKED
    size = needs.sides * layers * kept * options.page_bytes(fmt)
    shape = list(noise_shape)
    shape[2] = 1
    size = max(0, size - needs.held)
    worth = math.ceil(size / max(1, model.memory_required(shape)))
    shape[2] = needs.block + worth
    return executor(model, shape, conds, model_options, *args, **kwargs)


def _text(
    network: torch.nn.Module, options: CacheOptions, dtype: torch.dtype, device: torch.device
) -> str:
    per_token = page_format(network, (1, 0, 1, 2, 2), dtype, options.kind).page_bytes
    large = page_format(network, (1, 0, 1, 60, 104), dtype, options.kind)
    frame = len(network.blocks) * large.page_bytes
    lines = [
        f"causal Wan: {len(network.blocks)} layers, {network.num_heads} heads",
        f"window {options.window or 'all'} latent frames, sink {options.sink}",
        f"pages: {options.kind}, {per_token} bytes per token and layer",
        f"one latent frame at 832 x 480: {megabytes(frame)} per condition",
        f"attention over pages: {options.way}",
    ]
    if options.way == PAGED:
        where = "pages in main memory have to be copied first" if options.on_host else ""
        where = where or forecast(large, device, options.relative)
        lines.append(f"paged attention at 832 x 480: {where}")
    return "\n".join(lines)
