"""How the public causal Wan models were trained to be sampled.

Noise levels, frames per block and context as in each project's own inference configuration
(docs/causal.md names the files). All of them compute the keys and values that stay from the clean
block at noise level 0. Levels that a project names before its shift s = 5 go through
s t / (1 + (s - 1) t), as its "warp" does.
"""

from __future__ import annotations

from dataclasses import dataclass

AS_SET = "as set"


def warped(*levels: float, shift: float = 5.0) -> tuple[float, ...]:
    """Noise levels behind the shift, and the clean end."""
    return (*(shift * t / (1 + (shift - 1) * t) for t in levels), 0.0)


@dataclass(frozen=True)
class CausalPreset:
    """levels: of each block, from 1 down to 0; first: of the first block of a video, where they are
    others. block, window, sink: latent frames. recompute: whether the keys and values of
    the cached frames are computed again before every block.
    """

    levels: tuple[float, ...]
    block: int
    window: int = 21
    sink: int = 0
    first: tuple[float, ...] = ()
    recompute: bool = False


FOUR = warped(1.0, 0.75, 0.5, 0.25)
CAUSAL_PRESETS = {
    "Self-Forcing": CausalPreset(FOUR, 3),
    "CausVid": CausalPreset((1.0, 0.757, 0.522, 0.0), 3),
    "Causal-Forcing chunkwise": CausalPreset(FOUR, 3),
    "Causal-Forcing framewise": CausalPreset(FOUR, 1),
    "Causal-Forcing++ framewise 2 steps": CausalPreset(warped(1.0, 0.5), 1, first=FOUR),
    "Causal-Forcing++ framewise 1 step": CausalPreset(warped(1.0), 1, first=FOUR),
    # Its local attention of 12 frames has the sink of 3 inside.
    "LongLive": CausalPreset(FOUR, 3, 9, 3),
    # Three frames of context: the first of the video and the last two before the block.
    "Krea Realtime": CausalPreset((1.0, 0.937, 0.833, 0.625, 0.0), 3, 5, 1, recompute=True),
}
