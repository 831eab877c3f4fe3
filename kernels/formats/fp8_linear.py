"""Linear layers that multiply in fp8: activations are rounded to e4m3 with one scale per token.

For activations x [M, K], weights w[n, k] = q[n, k] * s[n] (q fp8, s one scale per output row or one
for all) and a bias b:

    t[m] = max_k |x[m, k]| / 448,  p = e4m3(x / t)
    y[m, n] = t[m] s[n] sum_k p[m, k] q[n, k] + b[n]

The scale is taken from the activations of each call, so nothing is clamped whatever their range; a
fixed scale of one, which ComfyUI uses, cuts what is above 448. Sums are in float32.

Two ways lead through torch._scaled_mm: with both vectors of scales inside the product (CUTLASS
kernels, bf16 results), and with the token scales applied to its result (cuBLASLt). Which of them a
device and a torch can do is not written down anywhere, so `choose` tries them against the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import FrugalError
from .block_scales import round_rows

E4M3 = torch.float8_e4m3fn
# Both inner dimensions of the matrix units' fp8 product.
MULTIPLE = 16
# Values turned to float32 at a time: bounds the working memory to 64 MB.
PIECE = 1 << 24
# Private in torch, and absent from old ones: `choose` finds out.
_scaled_mm: Any = getattr(torch, "_scaled_mm", None)
# Rounding of a bf16 result is 2^-9; a wrong axis or a dropped scale is far above.
AGREES = 0.01
# (p [M, K], t [M, 1], q [N, K], s [] or [N, 1], result type) -> y [M, N] without bias.
Product = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor
]


def fits(rows: int, width: int) -> bool:
    """Whether a weight [rows, width] has the shape that fp8 matrix units take."""
    return rows % MULTIPLE == 0 and width % MULTIPLE == 0


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [M, K] -> (e4m3 [M, K], float32 scale [M, 1]); a token of zeros keeps zeros, one
    that is not finite gives NaN.
    """
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    rows = max(1, PIECE // max(1, x.shape[1]))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        out[part], scales[part] = round_rows(x[part].float(), E4M3)
    return out, scales


def reference(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of the formula above in float32, rounded once to `dtype`."""
    sums = tokens.float() @ weight.float().t()
    return (sums * token_scale * scale.reshape(1, -1)).to(dtype)


def scales_inside(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product with both scale vectors inside torch._scaled_mm, which then gives bf16."""
    columns = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    made = _scaled_mm(
        tokens, weight.t(), scale_a=token_scale, scale_b=columns, out_dtype=torch.bfloat16
    )
    return made.to(dtype)


def scales_outside(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The bare product through torch._scaled_mm, scaled afterwards.

    Bare sums exceed fp16, so they are bf16 where the result is 16 bit.
    """
    one = torch.ones((), dtype=torch.float32, device=tokens.device)
    between = torch.float32 if dtype == torch.float32 else torch.bfloat16
    made = _scaled_mm(tokens, weight.t(), scale_a=one, scale_b=one, out_dtype=between)
    return made.mul_(token_scale).mul_(scale.reshape(1, -1)).to(dtype)


def choose(device: torch.device, weight_dtype: torch.dtype) -> tuple[str, Product]:
    """The first way through torch._scaled_mm that gives the formula's result on `device` for
    weights of `weight_dtype`: (name, product). Raises FrugalError with each way's reason if none
    does.
    """
    make = torch.Generator().manual_seed(1)
    tokens, token_scale = round_tokens(torch.randn(32, 64, generator=make).to(device))
    weight = torch.randn(48, 64, generator=make).to(device).to(weight_dtype)
    scale = (0.5 + torch.rand(48, 1, generator=make)).to(device)
    expected = reference(tokens, token_scale, weight, scale, torch.float32)
    reasons = []
    for name, product in (("scales inside", scales_inside), ("scales outside", scales_outside)):
        try:
            found = product(tokens, token_scale, weight, scale, torch.bfloat16).float()
        except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            reasons.append(f"{name}: {ascii(first)[1:-1][:120]}")
            continue
        error = float((found - expected).norm() / expected.norm())
        if error <= AGREES:
            return name, product
        reasons.append(f"{name}: off by {error:.3f}")
    raise FrugalError(
        f"torch {torch.__version__} on {device} cannot multiply fp8 ({'; '.join(reasons)})",
        "a working torch._scaled_mm",
        "set matmul to auto, or update torch",
    )


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    product: Product = reference,
) -> torch.Tensor:
    """y [..., N] in the type of x from x [..., K], weight fp8 [N, K], scale float32 [] or [N, 1]
    and bias [N] or None, by one of the products above.
    """
    flat = x.reshape(-1, x.shape[-1])
    tokens, token_scale = round_tokens(flat)
    out = product(tokens, token_scale, weight, scale, x.dtype)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0])
