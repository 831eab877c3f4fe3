"""What a step cache did in one run: data first, then text."""

from __future__ import annotations

from dataclasses import dataclass

FEW_STEPS = 8


@dataclass(frozen=True)
class StepCacheReport:
    """computed: model calls made. expected: for each skipped call the relative L2 error predicted
    for its velocity, of the worst sample. checked: for each condition of a computed call with a
    forecast, the error that it would have had. notes: sentences for the reader. path_error: the
    expected errors weighted by the part of the path that each step covers.
    """

    computed: int
    expected: tuple[float, ...] = ()
    checked: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    path_error: float = 0.0

    @property
    def skipped(self) -> int:
        return len(self.expected)

    def data(self) -> dict:
        """The numbers as plain types."""
        return {
            "computed": self.computed,
            "skipped": self.skipped,
            "expected_error_mean": _mean(self.expected),
            "expected_error_max": max(self.expected, default=None),
            "checked_error_mean": _mean(self.checked),
            "checked_error_max": max(self.checked, default=None),
            "expected_path_error": self.path_error,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        calls = self.computed + self.skipped
        lines = [f"step cache: {self.computed} of {calls} model calls made, {self.skipped} skipped"]
        if self.expected:
            lines.append(
                f"expected velocity error of the skipped calls: {_mean(self.expected):.2%} on "
                f"average, {max(self.expected):.2%} at most, {self.path_error:.2%} over the path"
            )
        if self.checked:
            lines.append(
                f"velocity error of {len(self.checked)} checked predictions: "
                f"{_mean(self.checked):.2%} on average, {max(self.checked):.2%} at most"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def advice(threshold: float, steps: int) -> list[str]:
    """Why a cache with these settings can do little or nothing in a run of `steps` steps."""
    notes = []
    if threshold <= 0:
        notes.append("threshold 0 never skips: the result is the same as without the cache")
    if steps <= FEW_STEPS:
        notes.append(
            f"{steps} steps: the first three are needed to learn from, and the rest of so short a "
            "run changes too much from step to step; use no cache here"
        )
    return notes


def _mean(values: tuple[float, ...]) -> float | None:
    return sum(values) / len(values) if values else None
