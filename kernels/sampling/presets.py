"""What each preset of the sampler switches on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """attention: whether to measure for the fastest exact kernel. threshold: of the step cache, 0
    for none. guidance_end: part of the schedule, 0..1, after which guidance is off (cfg 1, half
    the work). cfg: fixed guidance instead of the caller's, or None. plan: count the run's memory
    first and work in pieces where it would not fit.
    """

    attention: bool = False
    threshold: float = 0.0
    guidance_end: float = 1.0
    cfg: float | None = None
    plan: bool = False


PRESETS = {
    "off": Preset(),
    "quality": Preset(attention=True, threshold=0.02, plan=True),
    "balanced": Preset(attention=True, threshold=0.05, guidance_end=0.8, plan=True),
    "draft": Preset(attention=True, threshold=0.15, guidance_end=0.6, plan=True),
    "distilled": Preset(attention=True, cfg=1.0, plan=True),
}
