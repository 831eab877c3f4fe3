"""Between ComfyUI's MASK tensors and the mask kernels."""

from __future__ import annotations

import time

import comfy.utils
import numpy as np
import torch

from ...kernels.errors import FrugalError
from ...kernels.masks import driver
from ...kernels.masks.refine import RefineSettings, bbox, invert, refine

PREVIEWS = 4
PREPARING = "preparing: the first use after an install compiles for some seconds"


def to_array(mask: torch.Tensor) -> np.ndarray:
    """float32 array of a MASK, [H, W] or [B, H, W], from any device and float dtype; shares memory
    where it can.
    """
    if not isinstance(mask, torch.Tensor):
        raise FrugalError(
            f"a mask input of type {type(mask).__name__}", "a MASK tensor", "connect a MASK output"
        )
    if not mask.dtype.is_floating_point:
        mask = mask.to(torch.float32)
    return mask.detach().to("cpu", torch.float32).contiguous().numpy()


def refine_mask(
    mask: torch.Tensor, settings: RefineSettings
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int, int], str]:
    """Refined and inverted mask (float32 [B, H, W] on the device of `mask`), box (x, y, width,
    height), a text line.

    Progress is shown and cancelling works while it runs. The box is all 0 when the result is
    empty.
    """
    started = time.perf_counter()
    array = to_array(mask)
    bar = comfy.utils.ProgressBar(len(array) if array.ndim == 3 else 1)
    refined = refine(array, settings, lambda done, total: bar.update_absolute(done, total))
    found = bbox(refined)
    inverted = invert(refined)
    seconds = time.perf_counter() - started
    frames, height, width = refined.shape
    box = (
        f"box x {found[0]}, y {found[1]}, {found[2]} x {found[3]} px"
        if found
        else "the mask is empty"
    )
    text = (
        f"{frames} x {width} x {height} px in {1000 * seconds:.0f} ms ({driver.backend()})\n{box}"
    )
    result = [torch.from_numpy(values).to(mask.device) for values in (refined, inverted)]
    return result[0], result[1], found or (0, 0, 0, 0), text


def preview_frames(mask: torch.Tensor) -> torch.Tensor:
    """At most 4 frames, evenly spread with the first and the last: writing 81 previews would
    outlast the work.
    """
    if len(mask) <= PREVIEWS:
        return mask
    return mask[[round(n * (len(mask) - 1) / (PREVIEWS - 1)) for n in range(PREVIEWS)]]
