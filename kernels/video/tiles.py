"""Overlapping tiles of a picture, and what a VAE keeps between frames cut and joined with them.

Sizes are in latent pixels. A tensor may be finer by a whole factor, which is read off its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows `top` to `top + height`, columns `left` to `left + width`."""

    top: int
    left: int
    height: int
    width: int


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of one length begin: evenly spread, sharing at least `overlap`."""
    if tile >= length:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(number * (length - tile) / (count - 1)) for number in range(count)]


def grid(height: int, width: int, tile: tuple[int, int], overlap: int) -> list[Tile]:
    """Tiles that cover height x width, all of one size: `tile` (rows, columns), at most the whole.
    overlap: shared by neighbours at least, at most half a tile.
    """
    rows, columns = min(tile[0], height), min(tile[1], width)
    return [
        Tile(top, left, rows, columns)
        for top in starts(height, rows, min(overlap, rows // 2))
        for left in starts(width, columns, min(overlap, columns // 2))
    ]


def cut(whole: torch.Tensor, tile: Tile, height: int) -> torch.Tensor:
    """The part of [..., H, W] under a tile; `height`: the whole's rows in latent pixels."""
    scale = whole.shape[-2] // height
    rows = slice(tile.top * scale, (tile.top + tile.height) * scale)
    columns = slice(tile.left * scale, (tile.left + tile.width) * scale)
    return whole[..., rows, columns]


def join(
    parts: Sequence[torch.Tensor], tiles: Sequence[Tile], height: int, width: int
) -> torch.Tensor:
    """Tensors [..., h, w] of tiles as one [..., H, W] of the same type: where tiles overlap, their
    mean, weighted by the distance to the inner edge. One tile that covers all is returned as it is.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    scale = first.shape[-2] // tiles[0].height
    rows = [_ramp(tile.top, tile.height, tiles, "top") for tile in tiles]
    columns = [_ramp(tile.left, tile.width, tiles, "left") for tile in tiles]
    shape = (*first.shape[:-2], height * scale, width * scale)
    total = torch.zeros(shape, dtype=torch.float32, device=first.device)
    weights = torch.zeros(shape[-2:], dtype=torch.float32, device=first.device)
    for part, tile, down, across in zip(parts, tiles, rows, columns, strict=True):
        weight = _fine(down, scale)[:, None] * _fine(across, scale)[None]
        weight = weight.to(first.device)
        cut(total, tile, height).add_(part.float() * weight)
        cut(weights, tile, height).add_(weight)
    return (total / weights).to(first.dtype)


def _ramp(start: int, length: int, tiles: Sequence[Tile], edge: str) -> tuple[int, int, int]:
    """(length, rise, fall) in latent pixels: as far as the neighbours reach in."""
    others = {getattr(tile, edge) for tile in tiles}
    before = max((other for other in others if other < start), default=None)
    after = min((other for other in others if other > start), default=None)
    rise = 0 if before is None else before + length - start
    fall = 0 if after is None else start + length - after
    return length, rise, fall


def _fine(ramp: tuple[int, int, int], scale: int) -> torch.Tensor:
    length, rise, fall = (scale * part for part in ramp)
    place = torch.arange(length, dtype=torch.float32) + 0.5
    weight = torch.ones(length)
    if rise:
        weight = torch.minimum(weight, place / rise)
    if fall:
        weight = torch.minimum(weight, (length - place) / fall)
    return weight
