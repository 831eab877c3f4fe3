"""Pages by number: who holds them, how many bytes they are, and how many there may be.

A page is written once and never changed afterwards, so a branch that shares it needs no copy to be
safe from the others: it diverges by pages of its own. All pages of a pool have one size, and a page
given back serves the next that asks: there is no fragmentation to manage.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Generic, TypeVar

from ..errors import FrugalError
from ..report import megabytes

T = TypeVar("T")


class PagePool(Generic[T]):
    """Thread-safe pages of `page_bytes` bytes, made by `make()` when none is free.

    budget: bytes that used and free pages may take together, 0 for no limit.
    """

    def __init__(self, page_bytes: int, make: Callable[[], T], budget: int = 0):
        self.page_bytes, self.make, self.budget = page_bytes, make, budget
        self.peak_bytes = 0
        self._contents: dict[int, T] = {}
        self._holders: dict[int, int] = {}
        self._sealed: set[int] = set()
        self._away: set[int] = set()
        self._free: list[T] = []
        self._next = 0
        self._later: deque[list[int]] = deque()
        self._busy = 0
        self._lock = RLock()

    def require(self, count: int) -> None:
        """Raises FrugalError, before anything is allocated, if `count` pages in use at one time
        exceed the budget.
        """
        size = count * self.page_bytes
        if self.budget and size > self.budget:
            raise FrugalError(
                f"the attention cache needs {megabytes(size)} ({count} pages of "
                f"{megabytes(self.page_bytes)})",
                f"at most {megabytes(self.budget)}",
                "choose a smaller window or sink, fp8 or int8 pages, or a larger budget",
            )

    def take(self, count: int) -> tuple[int, ...]:
        """Numbers of `count` pages with one holder each; all or, on FrugalError (budget) or a
        failing `make`, none.
        """
        with self._exclusive():
            self.require(self._here() + count)
            found: list[T] = []
            try:
                for _ in range(count):
                    found.append(self._free.pop() if self._free else self.make())
            except BaseException:
                self._free += found
                raise
            pages = tuple(range(self._next, self._next + count))
            self._next += count
            self._contents.update(zip(pages, found, strict=True))
            self._holders.update(dict.fromkeys(pages, 1))
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return pages

    def adopt(self, contents: Iterable[T], away: bool) -> tuple[int, ...]:
        """Numbers of written pages with these contents, one holder each. away: as after
        `offload_pages`. Raises FrugalError if they are not and the budget has no room.
        """
        with self._exclusive():
            found = list(contents)
            if not away:
                self.require(self._here() + len(found))
                self.trim()
            pages = tuple(range(self._next, self._next + len(found)))
            self._next += len(found)
            self._contents.update(zip(pages, found, strict=True))
            self._holders.update(dict.fromkeys(pages, 1))
            self._sealed.update(pages)
            if away:
                self._away.update(pages)
            return pages

    def share(self, pages: Iterable[int]) -> None:
        """One holder more for each page. Raises KeyError, changing nothing, for one not in use."""
        with self._exclusive():
            pages = self._known(pages)
            for page in pages:
                self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less; without any a page is free. Raises KeyError, changing nothing, for a
        page given back more often than it was taken and shared.
        """
        with self._exclusive():
            self._drop(self._known(pages))

    def release_later(self, pages: Iterable[int]) -> None:
        """`drop`, at once or as soon as the pool's work of the moment is done: for finalizers,
        which may run in the middle of it.
        """
        self._later.append(list(pages))
        if self._lock.acquire(blocking=False):
            try:
                if not self._busy:
                    self._settle()
            finally:
                self._lock.release()

    def write(self, page: int, put: Callable[[T], None]) -> None:
        """Fill a page by `put(content)`, once. Raises KeyError for a page that is written or
        shared.
        """
        with self._exclusive():
            self._known([page])
            if page in self._sealed or self._holders[page] > 1:
                raise KeyError(f"page {page} is written already")
            put(self._contents[page])
            self._sealed.add(page)

    def read(self, page: int) -> T:
        with self._exclusive():
            return self._contents[page]

    def trim(self) -> int:
        """Let go of the free pages; returns bytes."""
        with self._exclusive():
            size = len(self._free) * self.page_bytes
            self._free.clear()
            return size

    def offload_pages(self, move: Callable[[T], T]) -> None:
        """Replace the content of every page by `move(content)`, all or (on an exception) none. Such
        pages count against no budget and serve nobody else when they are dropped.
        """
        with self._exclusive():
            moved = {
                page: move(self._contents[page]) for page in self._contents.keys() - self._away
            }
            self._contents.update(moved)
            self._away.update(moved)
            self.trim()

    def fetch(self, pages: Iterable[int], move: Callable[[T], T]) -> None:
        """The way back for those of `pages` that are away, all or none. Raises FrugalError if the
        budget has no room for them.
        """
        with self._exclusive():
            wanted = self._away.intersection(self._known(pages))
            self.require(self._here() + len(wanted))
            self.trim()
            moved = {page: move(self._contents[page]) for page in wanted}
            self._contents.update(moved)
            self._away -= wanted
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def refcount(self, page: int) -> int:
        with self._exclusive():
            return self._holders.get(page, 0)

    @property
    def used_bytes(self) -> int:
        """Pages in use that are not away."""
        with self._exclusive():
            return self._here() * self.page_bytes

    @property
    def away_bytes(self) -> int:
        with self._exclusive():
            return len(self._away) * self.page_bytes

    @property
    def held_bytes(self) -> int:
        """Used and free pages."""
        with self._exclusive():
            return self.used_bytes + len(self._free) * self.page_bytes

    def _here(self) -> int:
        return len(self._contents) - len(self._away)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            if not self._busy:
                self._settle()
            self._busy += 1
            try:
                yield
            finally:
                self._busy -= 1

    def _settle(self) -> None:
        self._busy += 1
        try:
            while self._later:
                self._drop(self._known(self._later.popleft()))
        finally:
            self._busy -= 1

    def _drop(self, pages: list[int]) -> None:
        for page, count in Counter(pages).items():
            if count > self._holders[page]:
                raise KeyError(f"page {page} is given back twice")
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._sealed.discard(page)
                content = self._contents.pop(page)
                if page in self._away:
                    self._away.remove(page)
                else:
                    self._free.append(content)

    def _known(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        for page in pages:
            if page not in self._holders:
                raise KeyError(f"page {page} is not in use")
        return pages
