"""The rotation of ConvRot: groups of inputs times a regular Hadamard matrix, which spreads outliers
over the group before rounding.
"""

from __future__ import annotations

import torch

from ..errors import FrugalError


def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The normalised Hadamard matrix, float32 [size, size], symmetric and its own inverse:
    Kronecker powers of the order 4 matrix with -1 on its second diagonal and 1 elsewhere.

    Raises FrugalError for a size that is no power of 4.
    """
    one = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    made = torch.ones(1, 1, device=device)
    while made.shape[0] < size:
        made = torch.kron(made, one / 2)
    if made.shape[0] != size:
        raise FrugalError(f"a rotation of {size} inputs", "a power of 4", "convert the model again")
    return made


def rotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Float [out, in], every `group` inputs times the Hadamard matrix; undoes itself.

    Raises FrugalError where `group` does not divide the inputs.
    """
    if weight.ndim != 2 or weight.shape[1] % group:
        raise FrugalError(
            f"a weight of shape {list(weight.shape)} rotated by {group}",
            f"a matrix with a multiple of {group} inputs",
            "convert the model again",
        )
    matrix = hadamard(group, weight.device).to(weight.dtype)
    return (weight.reshape(weight.shape[0], -1, group) @ matrix).reshape(weight.shape)
