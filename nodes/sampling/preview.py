"""A live preview whatever ComfyUI's own setting is: the latent's colours, of the middle frame."""

from __future__ import annotations

from typing import Any

import comfy.utils
import latent_preview
from comfy.patcher_extension import WrappersMP

from .._comfy import for_each_expert

KEY = "frugal.preview"
MIDDLE_FRAME, AS_SET = "colours of the middle frame", "as set in ComfyUI"


@for_each_expert
def apply(model: Any) -> Any:
    """A clone of the ModelPatcher `model` that shows each step, or `model` itself where its latent
    format has no colours.
    """
    form = model.model.latent_format
    if getattr(form, "latent_rgb_factors", None) is None:
        return model
    extras = (
        getattr(form, name, None)
        for name in ("latent_rgb_factors_bias", "latent_rgb_factors_reshape")
    )
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, *extras)

    def wrapper(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
        """A SAMPLER_SAMPLE wrapper; the sampler's callback gets x0 [B, C, (T,) H, W]."""
        bar = comfy.utils.ProgressBar(len(sigmas) - 1)

        def both(step, x0, x, total):
            if callback is not None:
                callback(step, x0, x, total)
            if x0.ndim == 5:
                middle = x0.shape[2] // 2
                x0 = x0[:, :, middle : middle + 1]
            bar.update_absolute(
                step + 1, total, previewer.decode_latent_to_preview_image("JPEG", x0)
            )

        return executor(guider, sigmas, extra_args, both, *args, **kwargs)

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, wrapper)
    return model
