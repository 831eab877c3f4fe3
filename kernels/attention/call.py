"""What a backend needs to know of one attention call, and the one mask form they all receive."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import FrugalError

NONE, BOOL, ADDITIVE = "none", "bool", "additive"


@dataclass(frozen=True)
class Call:
    """Facts of one call. q is (batch, heads, q_len, width), k (batch, kv_heads, k_len, width), v
    the same with v_width.

    device: torch's device type, "hip" for AMD. capability: of an NVIDIA device, else None. mask:
    "none", "bool" (True: attend) or "additive". lossy: 8-bit kernels are allowed here. grad:
    gradients are wanted.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    width: int
    v_width: int
    mask: str = NONE
    lossy: bool = False
    grad: bool = False

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products: 2 * B * H * Lq * Lk * (D + Dv)."""
        pairs = float(self.batch * self.heads) * self.q_len * self.k_len
        return 2.0 * pairs * (self.width + self.v_width)

    def key(self) -> str:
        """Calls of one key share a measured choice. Lengths are rounded up to eighths of a power
        of two, because growing lengths would else be measured again at each step.
        """
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind} B{self.batch} H{self.heads}/{self.kv_heads} "
            f"Lq{bucket(self.q_len)} Lk{bucket(self.k_len)} D{self.width}/{self.v_width} "
            f"mask={self.mask} lossy={int(self.lossy)}"
        )


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of an eighth of the power of two at or below it."""
    step = max(1, (1 << (length.bit_length() - 1)) // 8) if length > 0 else 1
    return -(-length // step) * step


def device_kind(device: torch.device) -> str:
    """torch's device type, but "hip" for AMD, which torch calls cuda."""
    return "hip" if device.type == "cuda" and torch.version.cuda is None else device.type


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA device, None for any other."""
    return torch.cuda.get_device_capability(device) if device_kind(device) == "cuda" else None


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    lossy: bool = False,
    capability: tuple[int, int] | None = None,
) -> Call:
    """The facts of attention over q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv).

    capability: of an NVIDIA device, where it is known already; it is looked up else.
    Raises FrugalError where the shapes, dtypes or devices do not belong together.
    """
    if not belong(q, k, v):
        found = (
            f"{n} {tuple(t.shape)} {t.dtype} {t.device}"
            for n, t in zip("qkv", (q, k, v), strict=True)
        )
        raise FrugalError(
            "; ".join(found),
            "(batch, heads, tokens, width) of one batch, width, dtype and device, as many values "
            "as keys, heads a multiple of the key heads",
            "check what feeds this attention",
        )
    batch, heads, q_len, width = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    return Call(
        device=device_kind(q.device),
        capability=capability_of(q.device) if capability is None else capability,
        dtype=q.dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        width=width,
        v_width=v.shape[3],
        mask=mask_kind(mask),
        lossy=lossy,
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )


def belong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether q, k and v are those of one attention call, as `describe` wants them."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and min(q.numel(), k.numel(), v.numel()) > 0
        and k.shape[0] == q.shape[0]
        and k.shape[3] == q.shape[3]
        and k.shape[:3] == v.shape[:3]
        and q.shape[1] % k.shape[1] == 0
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
    )


def mask_kind(mask: torch.Tensor | None) -> str:
    """NONE, BOOL or ADDITIVE."""
    if mask is None:
        return NONE
    return BOOL if mask.dtype == torch.bool else ADDITIVE


def four_axes(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask (Lq, Lk), (B, Lq, Lk) or (B, H, Lq, Lk), axes of 1 allowed, with four axes; bool
    stays bool, numbers become `dtype`. Raises FrugalError on other axes.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask[None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    elif mask.dim() != 4:
        raise FrugalError(
            f"an attention mask of {mask.dim()} axes", "2, 3 or 4", "reshape the mask"
        )
    return mask if mask.dtype == torch.bool else mask.to(dtype)
