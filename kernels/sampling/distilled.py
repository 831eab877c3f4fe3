"""What models distilled to few steps were trained at, and how a run differs from it.

LightX2V's and Lightning's Wan LoRAs are distilled at evenly spaced times, shifted by 5: four steps
at timesteps 1000, 937.5, 833.3 and 625. Every shape of the noise levels between them costs quality
that no step makes up, since the model knows these levels only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHIFT = 5.0
FEWEST, MOST = 4, 8
# ComfyUI takes levels from a table of 1000, so its own way to the same levels is off by up to this.
NEAR = 2e-3


def schedule(steps: int, shift: float = SHIFT) -> list[float]:
    """Noise levels 1 to 0 [steps + 1] at which such a model was distilled."""
    times = [1 - index / steps for index in range(steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


def advice(
    sigmas: Sequence[float],
    has_lora: Mapping[str, bool],
    cfg: Mapping[str, float],
) -> list[str]:
    """Notes on what of a run does not suit a distilled model. sigmas [steps + 1]: the run's noise
    levels, empty if it does not start from pure noise or the model knows no shift. has_lora and
    cfg: by the name of the model, one or two.
    """
    notes = []
    steps = len(sigmas) - 1
    wanted = schedule(steps) if FEWEST <= steps <= MOST else []
    if any(abs(found - right) > NEAR for found, right in zip(sigmas, wanted, strict=False)):
        notes.append(
            f"timesteps {_timesteps(sigmas)}: LightX2V and Lightning were distilled at "
            f"{_timesteps(wanted)}; for these set ModelSamplingSD3 to shift {SHIFT:g} and the "
            "scheduler to simple"
        )
    for name, guidance in cfg.items():
        if guidance > 1:
            notes.append(f"{name} runs at cfg {guidance:g}: distilled models are made for cfg 1")
    bare = [name for name, there in has_lora.items() if not there]
    if bare:
        notes.append(
            f"no LoRA on {' and '.join(bare)}: few steps need the distillation LoRA, unless the "
            "file has it merged"
        )
    return notes


def _timesteps(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{1000 * sigma:.4g}" for sigma in sigmas)
