"""How many pictures fit in one forward of CatVTON's UNet.

Activations grow in proportion to pixels and to pictures: 195, 439, 780 and 1755 MiB for one canvas
of 384 x 512, 576 x 768, 768 x 1024 and 1152 x 1536 px, traced in 16 bits with fused attention and
with guidance, which doubles the batch. That is 1040 bytes per canvas pixel at every size.
"""

from __future__ import annotations

BYTES_PER_PIXEL = 1040  # of a canvas, two bytes per number, guidance on
GUIDED = 2  # forwards per picture while guidance is on


def bytes_per_picture(size: tuple[int, int], element: int = 2, guided: bool = True) -> int:
    """Peak activation bytes of one picture on a canvas of `size` (H, W) px.

    element: bytes per number the UNet computes in. Attention that is not fused needs more.
    """
    full = size[0] * size[1] * BYTES_PER_PIXEL * element // 2
    return full if guided else full // GUIDED


def micro_batch(free: int, per_picture: int, largest: int) -> int:
    """Pictures per forward: as many as `free` bytes hold, at least 1, at most `largest`.

    1 even where nothing is free: ComfyUI then moves weights out of the way.
    """
    return max(1, min(largest, free // max(1, per_picture)))
