"""A weight as GPTQ's symmetric 4 bits, the form in which vLLM and its relatives take INT4.

    w[n, k] = (q[n, k] - 8) * s[k / group, n],  q from 0 to 15

stored as AutoGPTQ's first format has it (packed_int): words `qweight`, zero points `qzeros` one
below their value, `scales` in float16. Inputs stay in their order (desc_act off), so there is no
`g_idx`: vLLM-Omni 0.30 warns of one. vLLM's kernels want groups of 32, 64 or 128 and sides in
multiples of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import FrugalError
from ..formats import codec
from ..formats import table as formats
from ..formats.packed_int import GPTQ, PackedSpec, PackedWeight, dequantise, pack_gptq
from .gptq import curvature, solve_affine
from .grids import SymmetricGrid

if TYPE_CHECKING:
    from .calibration import LayerStatistics

BITS, SIDE = 4, 32
GROUPS = (32, 64, 128)
# What is added to a stored zero point: the first format keeps them one too low.
ZERO_OFFSET = 1


def suits(shape: tuple[int, int], group: int) -> str | None:
    """None if a weight of `shape` [out, in] can be held with this group, else the reason."""
    if group not in GROUPS:
        return f"the group is {group}, not one of {', '.join(map(str, GROUPS))}"
    if shape[1] % group:
        return f"it has {shape[1]} inputs, no multiple of {group}"
    if shape[0] % SIDE or not shape[0] or not shape[1]:
        return f"it has {shape[0]} outputs, no multiple of {SIDE}"
    return None


def tensor_specs(shape: tuple[int, int], group: int) -> formats.TensorSpecs:
    """Every tensor stored for a weight of `shape` [out, in]: name beside the layer -> (dtype,
    shape).
    """
    out, inside = shape
    return {
        "qweight": (torch.int32, (inside // 8, out)),
        "qzeros": (torch.int32, (inside // group, out // 8)),
        "scales": (torch.float16, (inside // group, out)),
    }


def encode(
    weight: torch.Tensor,
    group: int,
    device: torch.device | str,
    statistics: LayerStatistics | None = None,
    *,
    where: str = "the model",
) -> dict[str, torch.Tensor]:
    """The tensors of `tensor_specs` for a float weight [out, in], on the CPU, computed on `device`.

    With the statistics of the layer's inputs codes and scales are solved by GPTQ, else each group
    gets the scale with the least squared error of its weights. `where` ("file: layer") names the
    weight in errors. Raises FrugalError for a width that does not suit, and for a weight that is
    not finite or too large for float16 scales.
    """
    shape = (weight.shape[0], weight.shape[1])
    reason = suits(shape, group)
    if reason:
        raise FrugalError(
            f"{where} with shape {list(shape)} cannot be INT4: {reason}",
            "widths that suit the group",
            "choose a smaller group",
        )
    device = torch.device(device)
    if statistics is None:
        codes, scales = _nearest(weight, group, device, where)
    else:
        codes, scales = _solved(weight, statistics, group, device, where)
    if not bool(torch.isfinite(scales).all()):
        raise FrugalError(
            f"{where} holds a weight of {float(weight.abs().max()):.3g}",
            f"at most {7 * torch.finfo(torch.float16).max:.3g}, for scales in float16",
            "download the model again",
        )
    packed = pack_gptq(codes, scales, spec(shape, group))
    assert packed.zeros is not None
    return {"qweight": packed.words, "qzeros": packed.zeros, "scales": scales}


def decode(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], group: int) -> torch.Tensor:
    """The float32 weight [out, in] that the tensors of `tensor_specs` stand for."""
    words, zeros, scales = (tensors[suffix] for suffix in tensor_specs(shape, group))
    return dequantise(PackedWeight(words, scales, zeros, None, spec(shape, group)), torch.float32)


def spec(shape: tuple[int, int], group: int) -> PackedSpec:
    """How the words of a weight of `shape` [out, in] are read."""
    return PackedSpec(GPTQ, BITS, ZERO_OFFSET, shape[0], shape[1], group)


def _solved(
    weight: torch.Tensor,
    statistics: LayerStatistics,
    group: int,
    device: torch.device,
    where: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    for _ in codec.pieces(weight, device, where):
        pass
    inside = weight.shape[1]
    shape = curvature(statistics, inside, 0, group, device)
    codes, scales, _ = solve_affine(
        weight, shape, lambda rows: SymmetricGrid(rows, inside, group, device)
    )
    return codes, scales


def _nearest(
    weight: torch.Tensor, group: int, device: torch.device, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    out, inside = weight.shape
    codes = torch.empty(out, inside, dtype=torch.uint8)
    scales = torch.empty(inside // group, out, dtype=torch.float16)
    for rows, piece in codec.pieces(weight, device, where):
        # Every group of every row is a column of its own: one run of a grid.
        columns = piece.reshape(-1, group).t()
        grid = SymmetricGrid(columns.shape[1], group, group, device)
        table = grid.open(0, columns)
        tried = grid.snap(table, columns[:, None])
        best = (tried - columns[:, None]).square_().sum(0).argmin(0)
        grid.keep(0, table, best)
        values = tried.gather(1, best.expand(group, 1, -1))[:, 0]
        codes[rows] = grid.codes(values).reshape(piece.shape).cpu()
        scales[:, rows] = grid.scales.reshape(len(piece), -1).t().cpu()
    return codes, scales
