"""A format for every layer, so that the file fits a size with the least error.

What is summed. Each layer adds importance * (noise / signal): the relative energy of the error of
its own output, times the share of the model's output that depends on it. The errors of different
layers are taken as independent, so their energies add up. `importance.wiring` gives the shares from
how a Wan model is wired, `importance.probe` measures them. Without either every layer counts 1,
which spends bytes on layers that hardly matter: do not compare such a sum with an output.

How it is solved. Choosing one of several (bytes, error) pairs per layer under a sum of bytes is the
multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter
11). One sweep over the layers keeps all states that no other beats in both bytes and error
(Nemhauser and Ullmann 1969). The sweep does not know the budget: one frontier answers every budget,
so a larger budget can never give a larger error. Only where a frontier outgrows MOST_STATES is it
thinned; an answer then says how far from the optimum it can be, by the bound of the relaxed problem
(fractions of formats allowed).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FrugalError
from ..formats import table
from .curves import LayerCurve

GB = 10**9
# Bounds memory (4 bytes by layer and state) and time; real models stay below it.
MOST_STATES = 1 << 16


@dataclass(frozen=True)
class Allocation:
    """choice: layer -> format. bytes: whole payload, what stays included. error: the weighted sum.
    bound: no choice of this size or less has a smaller error. exact: nothing was thinned, so error
    is the least possible. notes: what a person should know, as sentences.
    """

    choice: Mapping[str, str]
    bytes: int
    error: float
    bound: float
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """At most this share of the error could be saved by a better choice; 0 if exact."""
        return 0.0 if self.exact or not self.error else max(0.0, 1 - self.bound / self.error)


@dataclass(frozen=True)
class Frontier:
    """Every choice worth making, from the smallest to the best: bytes int64 [n] rising, error
    float64 [n] falling, without what stays (`fixed` bytes). Made by `frontier`.
    """

    bytes: np.ndarray
    error: np.ndarray
    fixed: int
    exact: bool
    _layers: tuple[str, ...]
    _targets: tuple[tuple[str, ...], ...]
    _steps: tuple[np.ndarray, ...]
    _extra: tuple[tuple[int, float, Mapping[str, str]], ...]
    _relaxed: tuple[np.ndarray, np.ndarray]
    _wider: Mapping[str, int]

    @property
    def smallest(self) -> int:
        """Bytes of the smallest file."""
        return self.fixed + int(self.bytes[0])

    @property
    def largest(self) -> int:
        """Bytes of the file with the least error; more are of no use."""
        return self.fixed + int(self.bytes[-1])

    def at(self, budget: int) -> Allocation:
        """The choice with the least error in at most `budget` bytes.

        Raises FrugalError if the budget is below `smallest`.
        """
        if budget < self.smallest:
            raise self._too_small(budget)
        place = int(np.searchsorted(self.bytes, budget - self.fixed, side="right")) - 1
        size, error = int(self.bytes[place]), float(self.error[place])
        choice = self._trace(place)
        for other_size, other_error, other in self._extra:
            if other_size + self.fixed <= budget and (other_error, other_size) < (error, size):
                size, error, choice = other_size, other_error, dict(other)
        bound = error if self.exact else self._bound(budget - self.fixed, error)
        notes = []
        if budget >= self.largest:
            notes.append(
                f"every layer has its best format in {gigabytes(self.largest)}: the budget of "
                f"{gigabytes(budget)} is not needed"
            )
        if not self.exact:
            notes.append(
                f"the search was thinned: at most {100 * (1 - bound / error) if error else 0:.2g} "
                "percent of the error could be saved by a better choice"
            )
        return Allocation(choice, self.fixed + size, error, bound, self.exact, tuple(notes))

    def _bound(self, size: int, error: float) -> float:
        return min(error, float(np.interp(size, *self._relaxed)))

    def _trace(self, place: int) -> dict[str, str]:
        choice = {}
        for name, targets, steps in zip(
            reversed(self._layers), reversed(self._targets), reversed(self._steps), strict=True
        ):
            place, option = divmod(int(steps[place]), len(targets))
            choice[name] = targets[option]
        return dict(reversed(choice.items()))

    def _too_small(self, budget: int) -> FrugalError:
        least = min(self._wider.values(), default=self.smallest)
        helpful = [target for target, size in self._wider.items() if size <= budget]
        do = f"allow {' or '.join(helpful)} too, or raise the budget"
        if not helpful:
            do = f"raise the budget to at least {-(-self.smallest // 10**6) / 1000:.3f} GB"
            if least < self.smallest:
                best = min(self._wider, key=lambda target: self._wider[target])
                do += f", or to {-(-least // 10**6) / 1000:.3f} GB with {best} allowed too"
        return FrugalError(
            f"a budget of {gigabytes(budget)}",
            f"{gigabytes(self.smallest)} ({self.smallest} bytes) or more, the smallest size with "
            "the formats allowed",
            do,
        )


def gigabytes(size: int) -> str:
    """Bytes as text in GB (10^9 bytes), in MB below one."""
    return f"{size / GB:.3f} GB" if size >= GB else f"{size / 1e6:.3f} MB"


def allocate(
    curves: Mapping[str, LayerCurve],
    fixed: int,
    budget: int,
    allowed: Collection[str] | None = None,
    importance: Mapping[str, float] | None = None,
) -> Allocation:
    """`frontier(...).at(budget)`: one answer for one budget in bytes."""
    return frontier(curves, fixed, allowed, importance).at(budget)


def frontier(
    curves: Mapping[str, LayerCurve],
    fixed: int,
    allowed: Collection[str] | None = None,
    importance: Mapping[str, float] | None = None,
) -> Frontier:
    """All choices worth making for the layers of `curves`, each in one of the formats `allowed`
    (default: all measured); `fixed`: bytes of everything else in the file; `importance`: layer ->
    weight of its relative error energy, 0 or more (default 1 each).

    Raises FrugalError where a layer has no allowed format, or a number is not finite.
    """
    if not curves:
        raise FrugalError("no layer to choose a format for", "linear layers", "choose a Wan model")
    if allowed is not None:
        _check_known(allowed)
    names = tuple(curves)
    options = [_options(curve, allowed, importance) for curve in curves.values()]
    targets = tuple(tuple(target for target, _, _ in rows) for rows in options)
    sizes = np.zeros(1, dtype=np.int64)
    errors = np.zeros(1)
    steps, exact = [], True
    for rows in options:
        grown = np.concatenate([sizes + size for _, size, _ in rows])
        worse = np.concatenate([errors + error for _, _, error in rows])
        kept = _not_beaten(grown, worse)
        if len(kept) > MOST_STATES:
            kept, exact = kept[_thinned(grown[kept], worse[kept])], False
        option, parent = np.divmod(kept, len(sizes))
        steps.append((parent * len(rows) + option).astype(np.int32))
        sizes, errors = grown[kept], worse[kept]
    return Frontier(
        sizes,
        errors,
        int(fixed),
        exact,
        names,
        targets,
        tuple(steps),
        () if exact else _uniform(names, options),
        _relaxed(options),
        _wider(curves, allowed, fixed),
    )


Option = tuple[str, int, float]


def _check_known(allowed: Collection[str]) -> None:
    unknown = sorted(set(allowed) - set(table.TARGETS))
    if unknown or not allowed:
        raise FrugalError(
            f"formats allowed: {ascii(', '.join(unknown or ['none']))[:60]}",
            f"some of {', '.join(table.TARGETS)}",
            "choose from these",
        )


def _options(
    curve: LayerCurve, allowed: Collection[str] | None, importance: Mapping[str, float] | None
) -> list[Option]:
    if importance is not None and curve.name not in importance:
        raise FrugalError(
            f"no importance for {curve.name}", "one for every layer", "measure the model again"
        )
    missing = set(allowed or ()) - set(curve.formats) - set(curve.refused)
    if missing:
        raise FrugalError(
            f"{curve.name} was not measured in {', '.join(sorted(missing))}",
            "curves of every format allowed",
            "measure the model again with these formats",
        )
    weight = 1.0 if importance is None else float(importance[curve.name])
    rows = []
    for target in table.TARGETS:
        if target not in curve.formats or (allowed is not None and target not in allowed):
            continue
        made = curve.formats[target]
        error = weight * made.noise / made.signal if made.noise else 0.0
        if not (math.isfinite(error) and error >= 0):
            raise FrugalError(
                f"{curve.name} in {target} has the error {error:g} at importance {weight:g}",
                "finite numbers, 0 or more",
                "measure the model again",
            )
        rows.append((target, made.bytes, error))
    if not rows:
        refused = "; ".join(f"{target}: {why}" for target, why in curve.refused.items())
        raise FrugalError(
            f"{curve.name} fits none of the formats allowed ({refused or 'none was measured'})",
            "one format for every layer",
            f"allow {table.BF16} or {table.FP8} too",
        )
    return rows


def _not_beaten(sizes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Places of the states that no other beats or equals in both, by rising size."""
    order = np.lexsort((errors, sizes))
    ordered = errors[order]
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = ordered[1:] < np.minimum.accumulate(ordered)[:-1]
    return order[kept]


def _thinned(sizes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Places of at most MOST_STATES + 2 states: of each step of size the one nearest to the lower
    convex hull, and both ends. Does not depend on any budget.
    """
    hull = _hull(list(zip(sizes.tolist(), errors.tolist(), strict=True)))
    above = errors - np.interp(sizes, *np.array(hull, dtype=float).T)
    step = (sizes - sizes[0]) * (MOST_STATES - 1) // (sizes[-1] - sizes[0])
    order = np.lexsort((above, step))
    first = np.ones(len(order), dtype=bool)
    first[1:] = step[order][1:] != step[order][:-1]
    return np.union1d(order[first], [0, len(sizes) - 1])


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull from the smallest to the least error."""
    corners: list[tuple[int, float]] = []
    for size, error in sorted(points):
        if corners and error >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (a, at_a), (b, at_b) = corners[-2:]
            if (at_b - at_a) * (size - a) < (error - at_a) * (b - a):
                break
            corners.pop()
        corners.append((size, error))
    return corners


def _relaxed(options: Sequence[Sequence[Option]]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, error) corners of the optimum where fractions of formats are allowed: the steps of
    the hulls of all layers, steepest first. It bounds every real choice from below.
    """
    size, error = 0, 0.0
    steps = []
    for rows in options:
        corners = _hull([(size, error) for _, size, error in rows])
        size, error = size + corners[0][0], error + corners[0][1]
        steps += [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(corners)]
    steps.sort(key=lambda step: step[1] / step[0])
    sizes = size + np.cumsum([0, *(step[0] for step in steps)])
    errors = error + np.cumsum([0.0, *(step[1] for step in steps)])
    return sizes.astype(float), errors


def _uniform(
    names: Sequence[str], options: Sequence[Sequence[Option]]
) -> tuple[tuple[int, float, dict[str, str]], ...]:
    """Each format for all layers that it suits, the best for the rest: (bytes, error, choice)."""
    found = []
    for target in table.TARGETS:
        rows = [
            min(layer, key=lambda row, wanted=target: (row[0] != wanted, row[2], row[1]))
            for layer in options
        ]
        size, error = 0, 0.0
        for _, more, worse in rows:
            size, error = size + more, error + worse
        found.append((size, error, dict(zip(names, (row[0] for row in rows), strict=True))))
    return tuple(found)


def _wider(
    curves: Mapping[str, LayerCurve], allowed: Collection[str] | None, fixed: int
) -> dict[str, int]:
    """Smallest payload if one format more were allowed, for every format that makes it smaller."""

    def smallest(targets: Collection[str]) -> int:
        return fixed + sum(
            min(
                made.bytes if (made := curve.formats.get(target)) else _size(target, curve)
                for target in targets
                if target in curve.formats or table.suits(target, curve.shape) is None
            )
            for curve in curves.values()
        )

    used = {target for curve in curves.values() for target in curve.formats}
    if allowed is not None:
        used &= set(allowed)
    now = smallest(used)
    more = {target: smallest({*used, target}) for target in table.TARGETS if target not in used}
    return {target: size for target, size in more.items() if size < now}


def _size(target: str, curve: LayerCurve) -> int:
    return table.stored_bytes(target, curve.shape)
