"""One linear layer as GPTQ, AWQ and awq_w4a16 store it, and the weight that its words stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def packed_words(columns: list[np.ndarray], bits: int, places: Sequence[int]) -> np.ndarray:
    """Words int32 from arrays of small integers: array i goes to place `places[i]`, one at a time
    as the reference packers do.
    """
    words = np.zeros(columns[0].shape, dtype=np.uint32)
    for values, place in zip(columns, places, strict=True):
        words |= values.astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def gptq_or_awq_layer(
    weight: torch.Tensor,
    kind: str = "gptq",
    bits: int = 4,
    group: int = 64,
    symmetric: bool = False,
    act_order: bool = False,
    version: int = 1,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one layer (suffix -> tensor) and the float32 weight that they stand for."""
    rows, width = weight.shape
    index = np.arange(width) // group
    if act_order:
        index = index[np.random.default_rng(width).permutation(width)]
    floats = weight.double().numpy()
    scales = np.zeros((width // group, rows), dtype=np.float16)
    zeros = np.zeros((width // group, rows), dtype=np.int64)
    top = 2**bits - 1
    for number in range(width // group):
        part = floats[:, index == number]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[number] = (high - low) / top
        least = 1 if kind == "gptq" and version == 1 else 0
        zeros[number] = (
            2 ** (bits - 1)
            if symmetric
            else np.clip(np.round(-low / scales[number].astype(np.float64)), least, top)
        )
    q = np.clip(np.round(floats.T / scales[index]) + zeros[index], 0, top).astype(np.int64)
    meant = (q - zeros[index]) * scales[index].astype(np.float64)
    count = 32 // bits
    if kind == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        words = packed_words([q[:, i::8] for i in order], 4, range(8))
        stored = packed_words([zeros[:, i::8] for i in order], 4, range(8))
    else:
        words = packed_words([q[i::count] for i in range(count)], bits, range(count))
        away = zeros - (1 if version == 1 else 0)
        stored = packed_words([away[:, i::count] for i in range(count)], bits, range(count))
    layer = {"qweight": words, "qzeros": stored, "scales": scales}
    if kind == "gptq":
        layer["g_idx"] = index.astype(np.int32)
    tensors = {
        suffix: torch.from_numpy(np.ascontiguousarray(value)) for suffix, value in layer.items()
    }
    return tensors, torch.from_numpy(np.ascontiguousarray(meant.T)).float()


def w4a16_layer(
    weight: torch.Tensor, group: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one awq_w4a16 layer (suffix -> tensor) and the float32 weight that they stand for,
    value by value from the definition: (q - 8) * scale + zero, even input in the low half byte.
    """
    rows, width = weight.shape
    grouped = weight.double().reshape(rows, width // group, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = ((high - low) / 15).t().contiguous().to(dtype)
    zeros = (low + 8 * scales.t().double()).t().contiguous().to(dtype)
    s, z = scales.double().numpy(), zeros.double().numpy()
    floats = weight.double().numpy()
    q = np.zeros((rows, width), dtype=np.uint8)
    meant = np.zeros((rows, width))
    for column in range(width):
        g = column // group
        q[:, column] = np.clip(np.round((floats[:, column] - z[g]) / s[g]) + 8, 0, 15)
        meant[:, column] = (q[:, column].astype(np.float64) - 8) * s[g] + z[g]
    words = q[:, 0::2] + 16 * q[:, 1::2]
    tensors = {
        "weight": torch.from_numpy(words.astype(np.uint8).view(np.int8)),
        "weight_scale": scales,
        "weight_zeros": zeros,
    }
    return tensors, torch.from_numpy(meant).float()
