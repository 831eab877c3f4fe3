"""Matrix products that round by shape, as a BLAS does that picks its kernel by shape.

No library promises that a row of a product keeps its bits when the number of rows changes, and
which do keep them differs from CPU to CPU. Here every product, convolution and attention sums in
an order that follows from its shapes, layout and type, and the last rows, which fill no whole
tile, in another: the result stays one that a BLAS may give, the same call gives it again, and a
test that needs equal bits across shapes fails on every CPU. `pytest --rounding-by-shape=SEED`; the
tests' servers load this file as a custom node.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable

import torch
from torch._prims_common import suggest_memory_format

TILE = 16
_held: list[object] = []


def install(seed: int) -> None:
    """For the rest of the process, in every thread."""
    if _held:
        return
    library = torch.library.Library("aten", "IMPL", "CPU")
    _held.append(library)

    def replace(name: str, make: Callable) -> None:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        _held.append(kernel)

        library.impl(name, make(kernel.call_boxed, name, seed), with_keyset=True)

    with warnings.catch_warnings():
        # torch says that a kernel is overridden; that is what is wanted.
        warnings.simplefilter("ignore")
        for name in ("mm", "bmm"):
            replace(name, _product)
        for name in ("addmm", "baddbmm", "_addmm_activation", "addmm_"):
            replace(name, _added_product)
        replace("convolution", _convolution)
        replace("_scaled_dot_product_flash_attention_for_cpu", _attention)


def _turn(
    seed: int, name: str, size: int, *tensors: torch.Tensor | None, tail: bool = False
) -> int:
    """Where the sum over `size` begins: a number that depends on the call's shapes alone."""
    shapes = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors if t is not None]
    return zlib.crc32(repr((seed, name, shapes, tail)).encode()) % size if size else 0


def _by_tiles(multiply: Callable, rows: int) -> torch.Tensor:
    """multiply(slice of rows, is tail) joined along the rows."""
    whole = rows - rows % TILE
    if whole in (0, rows):
        return multiply(slice(None), whole == 0)
    parts = [multiply(slice(0, whole), False), multiply(slice(whole, None), True)]
    return torch.cat(parts, dim=-2)


def _product(original, name, seed):
    def product(keys, a, b):
        size = a.shape[-1]

        def part(rows, tail):
            turn = _turn(seed, name, size, a, b, tail=tail)
            return original(keys, a[..., rows, :].roll(turn, -1), b.roll(turn, -2))

        return _by_tiles(part, a.shape[-2])

    return product


def _added_product(original, name, seed):
    def product(keys, bias, a, b, *rest, **options):
        size = a.shape[-1]

        def part(rows, tail):
            turn = _turn(seed, name, size, bias, a, b, tail=tail)
            added = bias[..., rows, :] if bias.ndim > 1 and bias.shape[-2] > 1 else bias
            a_part, b_part = a[..., rows, :].roll(turn, -1), b.roll(turn, -2)
            return original(keys, added, a_part, b_part, *rest, **options)

        out = _by_tiles(part, a.shape[-2])
        # The in-place variant wrote to views of the bias.
        return bias if name.endswith("_") else out

    return product


def _convolution(original, name, seed):
    def convolution(keys, x, weight, bias, *arguments):
        groups = arguments[-1]
        if groups == 1 and not arguments[3]:
            # torch packs both into one block before it picks a kernel, whatever lies in between.
            dense = [t.contiguous(memory_format=suggest_memory_format(t)) for t in (x, weight)]
            turn = _turn(seed, name, weight.shape[1], *dense, bias)
            x, weight = x.roll(turn, 1), weight.roll(turn, 1)
        return original(keys, x, weight, bias, *arguments)

    return convolution


def _attention(original, name, seed):
    def attention(keys, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        turn = _turn(seed, name, q.shape[-1], q, k, v)
        q, k = q.roll(turn, -1), k.roll(turn, -1)
        if not is_causal:
            turn = _turn(seed, "keys", k.shape[-2], q, k, v)
            k, v = k.roll(turn, -2), v.roll(turn, -2)
            if attn_mask is not None and attn_mask.shape[-1] > 1:
                attn_mask = attn_mask.roll(turn, -1)
        return original(keys, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    return attention


NODE_CLASS_MAPPINGS: dict[str, type] = {}
if chosen := os.environ.get("FRUGAL_ROUNDING_BY_SHAPE"):
    install(int(chosen))
