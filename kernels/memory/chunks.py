"""The same result piece by piece over the tokens, with less memory in between.

Linear layers, activations, norms over the width and the queries of attention treat every token by
itself, so a long sequence can pass through them in pieces. Each token meets the same operations in
the same order; whether the last bit agrees is up to the matrix kernel, which may be another one for
fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Rows that a piece is a multiple of: matrix kernels work in tiles of up to 256 rows.
ROWS = 256
Rowwise = Callable[[torch.Tensor, slice], torch.Tensor]


def piece_rows(tokens: int, pieces: int) -> int:
    """Tokens of one of at most `pieces` equal pieces, rounded up to a multiple of ROWS."""
    return -(-tokens // (pieces * ROWS)) * ROWS


def in_pieces(rowwise: Rowwise, x: torch.Tensor, pieces: int) -> torch.Tensor:
    """`rowwise(x, all tokens)` as [B, N, ...] by at most `pieces` pieces of x [B, N, C].

    rowwise: gets [B, n, C] and the slice of N that it is, returns [B, n, ...] of any dtype.
    """
    tokens = x.shape[1]
    rows = piece_rows(tokens, pieces)
    if pieces <= 1 or rows >= tokens:
        return rowwise(x, slice(0, tokens))
    out: torch.Tensor | None = None
    for start in range(0, tokens, rows):
        here = slice(start, min(start + rows, tokens))
        # A linear layer adds its bias in another place to rows that are not one block of memory.
        part = rowwise(x[:, here].contiguous(), here)
        if out is None:
            out = part.new_empty(part.shape[0], tokens, *part.shape[2:])
        out[:, here] = part
        del part
    assert out is not None
    return out
