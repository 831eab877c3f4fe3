"""How the keys and values of one frame lie in a page: as computed, or in 8 bits per value.

8 bit pages have one scale per sample and head, the largest magnitude of that head over its range.
int8 rounds to nearest: an error of at most half a step, amax / 254. fp8 is e4m3 of the OCP 8-bit
floating point specification: 3 mantissa bits, so at most 1/16 of the value or, below the normal
range, 2**-10 of the scale, amax / 448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FrugalError

MODEL, FP8, INT8 = "model", "fp8", "int8"
KINDS = (MODEL, FP8, INT8)
E4M3 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, INT8: 127.0}
PATCH_SIZE = 2  # pixels of a latent frame that make one token, along each side


@dataclass
class Page:
    """k, v [B, tokens, heads, width]; in 8 bits with their scales float32 [B, 1, heads, 1]. slab,
    place: the larger tensor that it is a part of, and where, if it is.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    slab: Any = None
    place: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class PageFormat:
    """shape (B, tokens, heads, width) and dtype of K and V as attention has them; kind: one of
    KINDS. Raises FrugalError for a kind that does not exist.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    kind: str = MODEL

    def __post_init__(self):
        if self.kind not in KINDS:
            raise FrugalError(
                f"pages of kind {self.kind!r}", f"one of {', '.join(KINDS)}", "choose one of these"
            )

    @property
    def stored(self) -> torch.dtype:
        return {MODEL: self.dtype, FP8: E4M3, INT8: torch.int8}[self.kind]

    @property
    def page_bytes(self) -> int:
        """K, V and their scales."""
        samples, tokens, heads, width = self.shape
        scales = 0 if self.kind == MODEL else 4 * samples * heads
        return 2 * (samples * tokens * heads * width * self.stored.itemsize + scales)

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of a page's tensors by name."""
        found = {name: (tuple(self.shape), self.stored) for name in ("k", "v")}
        if self.kind != MODEL:
            samples, _, heads, _ = self.shape
            found |= dict.fromkeys(("k_scale", "v_scale"), ((samples, 1, heads, 1), torch.float32))
        return found

    def empty(self, device: torch.device) -> Page:
        made: dict[str, Any] = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.parts().items()
        }
        return Page(**made)

    def write(self, page: Page, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """k, v of `shape` and `dtype`, copied or rounded into the page. Raises FrugalError for
        others. For 8 bits the largest magnitude [], which is to be given to `check_finite`: reading
        it makes the host wait, so that is done for many pages at once. A page in main memory is
        whole after `offload.settle`.
        """
        largest, later = [], k.device.type == "cuda"
        for tensor, values, scale in ((page.k, k, page.k_scale), (page.v, v, page.v_scale)):
            if tuple(values.shape) != self.shape or values.dtype != self.dtype:
                raise FrugalError(
                    f"keys or values {tuple(values.shape)} {values.dtype}",
                    f"{self.shape} {self.dtype}",
                    "use one size and one compute type for a whole video",
                )
            if scale is None:
                tensor.copy_(values, non_blocking=later)
                continue
            amax = values.float().abs().amax(dim=(1, 3), keepdim=True)
            largest.append(amax.amax())
            exact = (amax / LARGEST[self.kind]).clamp_min(torch.finfo(torch.float32).tiny)
            ratio = values.float() / exact
            if self.kind == INT8:
                ratio = ratio.round()
            ratio = ratio.clamp(-LARGEST[self.kind], LARGEST[self.kind])
            tensor.copy_(ratio.to(self.stored), non_blocking=later)
            scale.copy_(exact, non_blocking=later)
        return torch.maximum(*largest) if largest else None

    def read(self, page: Page, device: torch.device, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill k, v of `shape` and `dtype` on `device` with what the page holds."""
        for out, tensor, scale in ((k, page.k, page.k_scale), (v, page.v, page.v_scale)):
            if scale is None:
                out.copy_(tensor, non_blocking=True)
            else:
                values = tensor.to(device, non_blocking=True).float()
                out.copy_(values.mul_(scale.to(device, non_blocking=True)))


def check_finite(largest: float) -> None:
    """Raises FrugalError unless the largest magnitude that was written is a number."""
    if not math.isfinite(largest):
        raise FrugalError(
            "a key or value that is not finite",
            "finite numbers, to keep them in 8 bits",
            "look for the step that overflows, or keep pages in the model's type",
        )


def relative_error(fmt: PageFormat, page: Page, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Larger of the relative L2 errors of K and V in the page, against k and v; float32 []."""
    back = torch.empty_like(k), torch.empty_like(v)
    fmt.read(page, k.device, *back)
    errors = [
        (held.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30)
        for held, exact in zip(back, (k, v), strict=True)
    ]
    return torch.maximum(*errors)


def wan_page(
    latent: Sequence[int], heads: int, width: int, dtype: torch.dtype, kind: str
) -> PageFormat:
    """Of one frame of a latent [B, C, T, h, w] in one layer of a Wan of `heads` heads, `width` wide
    together.
    """
    tokens = math.ceil(latent[-2] / PATCH_SIZE) * math.ceil(latent[-1] / PATCH_SIZE)
    return PageFormat((latent[0], tokens, heads, width // heads), dtype, kind)
