"""Which persons wear which garments, in what groups, and how a group shrinks when memory runs out.

Nothing here knows a model: `work` takes a list of job numbers and returns one result per number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import FrugalError
from ..retry import NothingLeftError, retry

PAIRS, ALL = "pairs", "all combinations"
Result = TypeVar("Result")


def jobs(persons: int, garments: int, mode: str) -> list[tuple[int, int]]:
    """(person, garment) index of every picture, in the order of delivery.

    "pairs": first with first; a single one serves all. "all combinations": every garment on the
    first person, then on the second. Raises FrugalError for nothing to do, unequal numbers in
    pairs, or another mode.
    """
    if not persons or not garments:
        raise FrugalError(
            f"there are {persons} persons and {garments} garments",
            "at least one of each",
            "connect pictures",
        )
    if mode == ALL:
        return [(p, g) for p in range(persons) for g in range(garments)]
    if mode != PAIRS:
        raise FrugalError(f"the mode is '{mode}'", f"'{PAIRS}' or '{ALL}'", "choose one of these")
    if persons != garments and 1 not in (persons, garments):
        raise FrugalError(
            f"there are {persons} persons and {garments} garments",
            "equal numbers, or a single one that serves all",
            f"choose '{ALL}', or connect as many of each",
        )
    count = max(persons, garments)
    return [(i if persons > 1 else 0, i if garments > 1 else 0) for i in range(count)]


def buckets(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Job numbers by canvas size (H, W), small canvases first: what is likely to fit is done first.

    Numbers within a size keep their order.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for number, size in enumerate(sizes):
        found.setdefault(size, []).append(number)
    return dict(sorted(found.items(), key=lambda entry: (entry[0][0] * entry[0][1], entry[0])))


class OnceEach:
    """Remembers what `make` gave for the latest `most` keys, and for how many keys it was made."""

    def __init__(self, make: Callable[..., Any], most: int):
        self._make, self._most, self._seen = make, most, set[Hashable]()
        self._kept: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, *args: Any) -> Any:
        made = self._kept.pop(key) if key in self._kept else self._make(*args)
        self._seen.add(key)
        self._kept[key] = made  # the newest is last
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
        return made

    @property
    def made(self) -> int:
        return len(self._seen)


def rounds(count: int, size: int) -> list[range]:
    """Job numbers 0..count - 1 in order, `size` at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass
class Outcome:
    """Results by job number, the sizes of the groups that were done, and the number of times that
    memory ran out.

    failed: job number at which one picture alone did not fit, else None.
    """

    results: dict[int, Any] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    halvings: int = 0
    failed: int | None = None


def run_halving(
    numbers: Sequence[int],
    size: int,
    work: Callable[[list[int]], Sequence[Any]],
    out_of_memory: Callable[[Exception], bool],
    recover: Callable[[], None],
    outcome: Outcome,
) -> None:
    """Work through `numbers` in groups of `size`; fill `outcome` as each group is done.

    When `out_of_memory` says yes to what `work` raised, `recover` is called, the group is halved
    (rounded down, and it stays that small) and taken up again at the same job. When a group of one
    fails so, `outcome.failed` names it and the rest is left undone. Any other exception passes
    through; what was done before stays in `outcome`.
    """
    at, size = 0, max(1, size)

    def group() -> list[int]:
        return list(numbers[at : at + size])

    def halves() -> Iterator[None]:
        nonlocal size
        while len(group()) > 1:
            recover()
            size = len(group()) // 2
            outcome.halvings += 1
            yield
        recover()

    while at < len(numbers):
        try:
            done = retry(lambda: work(group()), out_of_memory, halves())
        except NothingLeftError:
            outcome.failed = numbers[at]
            return
        if len(done) != len(group()):
            raise RuntimeError(f"{len(done)} results for {len(group())} jobs")
        outcome.results.update(zip(group(), done, strict=True))
        outcome.groups.append(len(group()))
        at += len(done)
