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
        # ComfyUI's own preview is of the first frame it is given: one picture a step, not two.
        own = latent_preview.get_previewer(guider.model_patcher.load_device, form) is not None

        def shown(step, x0, x, total):
            middle = x0
            if x0.ndim == 5:
                frame = x0.shape[2] // 2
                middle = x0[:, :, frame : frame + 1]
            if callback is not None:
                callback(step, middle if own else x0, x, total)
            if not own or callback is None:
                bar.update_absolute(
                    step + 1, total, previewer.decode_latent_to_preview_image("JPEG", middle)
                )

        return executor(guider, sigmas, extra_args, shown, *args, **kwargs)

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, wrapper)
    return model
