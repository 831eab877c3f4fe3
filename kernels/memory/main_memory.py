"""Main memory of a run with one or two experts, phase by phase, before it starts.

Weights are there in two ways. Copied ones take memory of their own for as long as the MODEL exists.
Mapped ones are pages of the file: the system drops them where it needs the room and reads them
again, so they cost time and never fail. A model that was on a device of its own comes back from
there as a copy, unless ComfyUI streams it, so that a switch of experts makes a mapped one a copied
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..report import megabytes

TEXT = "text encoding"


@dataclass(frozen=True)
class Held:
    """Weights of one model in bytes: copied and mapped. returns: whether they come back from the
    device as a copy.
    """

    name: str
    copied: int
    mapped: int
    returns: bool = False

    @property
    def back(self) -> Held:
        """The same after it was on the device."""
        if not self.returns:
            return self
        return replace(self, copied=self.copied + self.mapped, mapped=0)


@dataclass(frozen=True)
class Stage:
    """Main memory in one phase, in bytes."""

    name: str
    copied: int
    mapped: int


@dataclass(frozen=True)
class MainMemory:
    """room: bytes that copied weights may take, those included that are there already. choices:
    format -> bytes of all experts in it, largest first.
    """

    room: int
    stages: tuple[Stage, ...]
    choices: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.copied)

    @property
    def fits(self) -> bool:
        return self.peak.copied <= self.room

    def lines(self) -> list[str]:
        stages = "; ".join(
            f"{stage.name} {megabytes(stage.copied)} copied, {megabytes(stage.mapped)} mapped"
            for stage in self.stages
        )
        return [f"main memory, {megabytes(self.room)} for it: {stages}"]

    def advice(self) -> list[str]:
        peak = self.peak
        if self.fits:
            again = max(stage.copied + stage.mapped - self.room for stage in self.stages)
            if again <= 0:
                return []
            return [
                f"about {megabytes(again)} of the mapped files do not stay in main memory and are "
                "read from disk again: a fast disk, or smaller files, help"
            ]
        fitting = next((f for f, size in self.choices.items() if size <= self.room), None)
        do = (
            f"choose {fitting} files ({megabytes(self.choices[fitting])} in all)"
            if fitting
            else "no file of this size fits: free main memory, or use a smaller model"
        )
        return [
            f"{peak.name} needs {megabytes(peak.copied)} of main memory and "
            f"{megabytes(self.room)} are there, so the system will swap: {do}"
        ]


def main_memory(
    experts: Sequence[Held],
    encoder: Held | None,
    free: int,
    choices: Mapping[str, int],
) -> MainMemory:
    """The phases of a run. experts: in the order in which they run. free: bytes free in main memory
    now, with all of these models loaded. choices: format -> bytes of all experts in it.
    """
    every = [*experts, *([encoder] if encoder else [])]
    stages = [_stage(TEXT, every)] if encoder else []
    for number, expert in enumerate(experts):
        # Those that have run are back from the device; those to come are as they were loaded.
        now = [each.back if at < number else each for at, each in enumerate(experts)]
        stages.append(_stage(expert.name, [*now, *([encoder.back] if encoder else [])]))
    stages.append(_stage("after the run", [each.back for each in every]))
    room = free + sum(each.copied for each in every)
    ordered = dict(sorted(choices.items(), key=lambda item: -item[1]))
    return MainMemory(room, tuple(stages), ordered)


def _stage(name: str, held: Sequence[Held]) -> Stage:
    return Stage(name, sum(each.copied for each in held), sum(each.mapped for each in held))
