"""CatVTON's UNet as ComfyUI's own models: cross-attention skipped, conditioning checked."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_base import ModelType

from ...kernels.checkpoints import catvton
from ...kernels.errors import FrugalError


class SkipCrossAttention(torch.nn.Module):
    """Stands for `attn2`: returns its input, so that the block computes x + norm2(x).

    CatVTON skips cross-attention this way; deleting the module would add self-attention twice.
    """

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


class Masked(comfy.model_base.BaseModel):
    """The 9-channel model. ComfyUI would take a missing mask for one that repaints everything."""

    def concat_cond(self, **kwargs):
        masks = (kwargs.get("concat_mask"), kwargs.get("denoise_mask"))
        if kwargs.get("concat_latent_image") is not None and all(mask is None for mask in masks):
            raise FrugalError(
                "the conditioning of a model with mask has a picture and no mask",
                "both",
                "use 'Try-On Conditioning'; 'Mask-Free' is for 8-channel weights",
            )
        return super().concat_cond(**kwargs)


class MaskFree(comfy.model_base.SD15_instructpix2pix):
    """The 8-channel model. ComfyUI would stretch a picture of another size and ignore a mask."""

    def concat_cond(self, **kwargs):
        image, noise = kwargs.get("concat_latent_image"), kwargs["noise"]
        masked = kwargs.get("concat_mask") is not None
        if image is None or masked or image.shape[1:] != noise.shape[1:]:
            found = "no picture" if image is None else f"a picture of shape {list(image.shape)}"
            raise FrugalError(
                f"the conditioning of the mask-free model has {found}{' and a mask' * masked}",
                f"no mask, and a picture of the LATENT's shape {list(noise.shape)}",
                "use 'Try-On Conditioning, Mask-Free', its LATENT included",
            )
        return super().concat_cond(**kwargs)


class CatVTONConfig(comfy.supported_models.SD15):
    """Core's SD 1.5 without cross-attention; `prediction` is set per instance."""

    prediction = ModelType.EPS

    def model_type(self, state_dict, prefix=""):
        return self.prediction

    def get_model(self, state_dict, prefix="", device=None):
        free = self.unet_config["in_channels"] == catvton.MASK_FREE_CHANNELS
        kind = self.model_type(state_dict, prefix)
        model = (MaskFree if free else Masked)(self, model_type=kind, device=device)
        if not free:
            model.set_inpaint()
        for name in cross_attention_modules(model.diffusion_model):
            comfy.utils.set_attr(model.diffusion_model, name, SkipCrossAttention())
        return model


def cross_attention_modules(unet: torch.nn.Module) -> list[str]:
    """Names of every `attn2` of a UNet."""
    return [
        name
        for name, module in unet.named_modules()
        if name.rpartition(".")[2] == "attn2" and module is not None
    ]


def apply_skip_cross_attention(patcher):
    """Clone of a loaded MODEL whose cross-attention is skipped by object patches; undone on
    unpatch.
    """
    patcher = patcher.clone()
    names = cross_attention_modules(patcher.model.diffusion_model)
    if not names:
        raise FrugalError(
            "the model has 0 cross-attention blocks",
            "an SD 1.5 UNet",
            "connect the MODEL of 'Load CatVTON'",
        )
    for name in names:
        patcher.add_object_patch(f"diffusion_model.{name}", SkipCrossAttention())
    return patcher
