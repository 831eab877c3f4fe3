"""Seeds of the noise of a video that is made block by block.

Noise is drawn frame by frame, so that a video is the same in one run or several. Seeds that are
counted on from the user's would give neighbouring seeds the same noise, moved by a frame; and
PyTorch's generator on the CPU uses the lower 32 bits of a seed alone.
"""

from __future__ import annotations

import hashlib

FRAME, STEP = "frame", "step"


def noise_seed(seed: int, use: str, *place: int) -> int:
    """A seed for the numbers drawn at `place` for one use, FRAME (frame) or STEP (block, step):
    another for every seed, use and place.
    """
    text = ",".join(map(str, (seed, use, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
