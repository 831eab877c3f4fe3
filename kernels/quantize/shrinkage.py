"""H of few inputs made fit for use: its correlations are drawn towards zero, its diagonal stays.

Few inputs leave most directions unseen, and chance fills the rest. What is solved on such an H is
exact on these inputs and nowhere else, so the same H, taken as it is, finds the error too small: by
up to 4 times on the synthetic layers of bench/gptq.py. Solving and judging both use the shrunk one.

The part taken is that of Chen et al. (Shrinkage algorithms for MMSE covariance estimation, arXiv
0907.4698), squared: as it stands it is meant for the matrix itself, and takes too much for what is
made with it.
"""

from __future__ import annotations

import torch

from ..device_types import wide

BLOCK = 128


def shrink_(hessian: torch.Tensor, rows: int) -> float:
    """Shrink H, float32 [in, in], in place, for the number of inputs that it is the mean of, 0 for
    enough. Returns the part that was taken from what is off the diagonal, 0 to 1.
    """
    part = shrinkage(hessian, rows) ** 2 if rows else 0.0
    if part:
        diagonal = hessian.diagonal().clone()
        hessian.mul_(1 - part).diagonal().copy_(diagonal)
    return part


def shrinkage(hessian: torch.Tensor, rows: int) -> float:
    """How much of the correlations in H, float32 [in, in], to give up for its diagonal if H is the
    mean over `rows` inputs, 0 to 1: equation 23 of arXiv 0907.4698 for the matrix of correlations.
    """
    root = hessian.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    size = int((root > 0).sum())
    square = 0.0
    for start in range(0, len(hessian), BLOCK):
        piece = hessian[start : start + BLOCK] * inverse[start : start + BLOCK, None]
        square += float((piece * inverse).square().sum(dtype=wide(piece.device)))
    # Without any correlation there is nothing to keep.
    apart = square - size
    if size < 2 or apart <= 0:
        return 1.0
    part = ((1 - 2 / size) * square + size**2) / ((rows + 1 - 2 / size) * apart)
    return min(1.0, max(0.0, part))
