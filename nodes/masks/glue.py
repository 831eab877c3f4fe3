"""Between ComfyUI's MASK and IMAGE tensors and the mask kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.utils
import numpy as np
import torch

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.masks import agnostic
from ...kernels.masks import dispatch as driver
from ...kernels.masks import labels as label_maps
from ...kernels.masks.refine import RefineSettings, bbox, invert, refine, refine_both, regions

PREPARING = "preparing: the first use after an install compiles for some seconds"

Progress = Callable[[int, int], None]


def to_array(tensor: torch.Tensor, name: str = "mask") -> np.ndarray:
    """float32 C-contiguous array of a MASK or IMAGE from any device and dtype; shares memory where
    it can. `name` is for the message.
    """
    if not isinstance(tensor, torch.Tensor):
        raise FrugalError(
            f"a {name} input of type {type(tensor).__name__}",
            f"a {name.upper()} tensor",
            f"connect a {name.upper()} output",
        )
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def to_tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """The array as a tensor on the device of `like`."""
    return torch.from_numpy(array).to(like.device)


def measured(work: Callable[[Progress], np.ndarray]) -> tuple[np.ndarray, str]:
    """Result of work(progress), and a line with its size and time.

    Progress is shown, and cancelling stops the work, after each share of the frames.
    """
    started = time.perf_counter()
    bar = comfy.utils.ProgressBar(1)
    made = work(lambda done, total: bar.update_absolute(done, total))
    milliseconds = 1000 * (time.perf_counter() - started)
    frames, height, width = made.shape[:3]
    line = f"{frames} x {width} x {height} px in {milliseconds:.0f} ms ({driver.backend()})"
    return made, line


def edit_mask(
    mask: torch.Tensor, work: Callable[[np.ndarray, Progress], np.ndarray]
) -> tuple[torch.Tensor, str]:
    """work(array, progress) on a MASK: the float32 [B, H, W] result on the mask's device, and a
    line with size and time.
    """
    array = to_array(mask)
    made, line = measured(lambda progress: work(array, progress))
    return to_tensor(made, mask), line


def clean_mask(mask: torch.Tensor, settings: RefineSettings) -> tuple[torch.Tensor, int, str]:
    """Cleaned mask (float32 [B, H, W] on the device of `mask`), number of regions left in all its
    frames, a text line with that number frame by frame.
    """
    array = to_array(mask)
    made, line = measured(lambda progress: refine(array, settings, progress))
    found = regions(made)
    shown = " ".join(str(count) for count in found[:16]) + (" ..." if len(found) > 16 else "")
    return to_tensor(made, mask), int(found.sum()), f"{line}\nregions: {shown}"


def refine_mask(
    mask: torch.Tensor, settings: RefineSettings
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int, int], str]:
    """Refined and inverted mask (float32 [B, H, W] on the device of `mask`), box (x, y, width,
    height), a text line. The box is all 0 when the result is empty.
    """
    array = to_array(mask)
    inverse: np.ndarray

    def both(progress: Progress) -> np.ndarray:
        nonlocal inverse
        made, inverse = refine_both(array, settings, progress)
        return made

    refined, line = measured(both)
    found = bbox(refined)
    box = (
        f"box x {found[0]}, y {found[1]}, {found[2]} x {found[3]} px"
        if found
        else "the mask is empty"
    )
    both = to_tensor(refined, mask), to_tensor(inverse, mask)
    return *both, found or (0, 0, 0, 0), f"{line}\n{box}"


def mask_of_labels(
    labels: torch.Tensor, map: str, parts: str, encoding: str
) -> tuple[torch.Tensor, str]:
    """MASK of the named parts of a label map IMAGE, on its device, and a line that says how it was
    read.
    """
    picture = to_array(labels, "image")
    if map == "colours":
        made, how = label_maps.select_colours(picture, parts), "colours"
    else:
        ids = label_maps.part_ids(map, parts)
        found, how = label_maps.decode(picture, map, encoding)
        made = label_maps.select(found, ids)
        how = f"read as {how}, labels {', '.join(str(n) for n in ids)}"
    share = 100 * float(made.mean()) if made.size else 0.0
    return to_tensor(made, labels), f"{how}: {share:.1f} % of the picture"


def agnostic_mask(
    densepose: torch.Tensor | None,
    lip: torch.Tensor | None,
    atr: torch.Tensor | None,
    settings: agnostic.AgnosticSettings,
) -> tuple[torch.Tensor, str]:
    """MASK of what to repaint from label map IMAGEs, on the device of the first one, and a text."""
    given = {"DensePose": densepose, "LIP": lip, "ATR": atr}
    maps: dict[str, np.ndarray | None] = dict.fromkeys(given)
    notes = []
    for name, picture in given.items():
        if picture is None:
            notes.append(f"no {name} map")
        else:
            maps[name], how = label_maps.decode(to_array(picture, "image"), name)
            notes.append(f"{name} read as {how}")
    if densepose is None:
        notes.append("hands and feet are not protected")
    if note := agnostic.coat_note(settings.part, lip is not None):
        notes.append(f"note: {note}")
        LOG.warning("[Frugal] Cloth Mask: %s.", note)
    made, line = measured(lambda step: agnostic.agnostic_mask(*maps.values(), settings, step))
    like = next(picture for picture in given.values() if picture is not None)
    return to_tensor(made, like), "\n".join([line, *notes])


def inverted(mask: torch.Tensor) -> torch.Tensor:
    """1 - mask, on its device."""
    return to_tensor(invert(to_array(mask)), mask)
