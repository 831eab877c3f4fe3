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
    _check_size(size)
    one = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    made = torch.ones(1, 1, device=device)
    while made.shape[0] < size:
        made = torch.kron(made, one / 2)
    return made


@torch.no_grad()
def rotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Float [out, in], every `group` inputs times the Hadamard matrix; undoes itself.

    Fast transform: sums of four, element by element, so that what is written to a file is the same
    on every CPU and card, with any number of threads and any cut into rows. A matrix product gives
    none of that. Raises FrugalError where `group` does not divide the inputs.
    """
    _check(weight, group)
    made, step = weight, 1
    while step < group:
        four = made.reshape(-1, 4, step)
        half = (four[:, 0] + four[:, 1]).add_(four[:, 2] + four[:, 3]).mul_(0.5)
        made = torch.empty_like(four)
        for place in range(4):
            torch.sub(half, four[:, 3 - place], out=made[:, place])
        step *= 4
    return made.reshape(weight.shape)


def rotate_by_matmul(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`rotate` as a matrix product: faster, equal up to rounding. For weights about to be used."""
    _check(weight, group)
    matrix = hadamard(group, weight.device).to(weight.dtype)
    return (weight.reshape(weight.shape[0], -1, group) @ matrix).reshape(weight.shape)


def _check(weight: torch.Tensor, group: int) -> None:
    if weight.ndim != 2 or weight.shape[1] % group:
        raise FrugalError(
            f"a weight of shape {list(weight.shape)} rotated by {group}",
            f"a matrix with a multiple of {group} inputs",
            "convert the model again",
        )
    _check_size(group)


def _check_size(size: int) -> None:
    if size not in (4**power for power in range(16)):
        raise FrugalError(f"a rotation of {size} inputs", "a power of 4", "convert the model again")
