"""Pages are taken, shared and given back without a leak, whatever the order, the thread or the
moment of a failure.
"""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from frugal.kernels.causal.page_pool import PagePool
from frugal.kernels.errors import FrugalError

SIZE, LIMIT = 10, 12


class Content:
    """What stands for a page's tensors: knows who wrote it last."""

    def __init__(self):
        self.text = None


def consistent(pool, held: Counter) -> None:
    """The pool against a plain count of who holds what."""
    assert {page: pool.refcount(page) for page in held if held[page]} == +held
    assert pool.used_bytes == SIZE * len(+held)
    assert pool.held_bytes >= pool.used_bytes
    assert not pool.budget or pool.held_bytes <= pool.budget


class Pages(RuleBasedStateMachine):
    """Random users of one pool, each a list of pages, against a model that only counts."""

    users = Bundle("users")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(SIZE, Content, LIMIT * SIZE)
        self.held: Counter = Counter()
        self.written: dict[int, str] = {}

    @rule(target=users, count=st.integers(0, 5))
    def take(self, count):
        fits = len(+self.held) + count <= LIMIT
        try:
            pages = list(self.pool.take(count))
        except FrugalError:
            assert not fits
            return []
        assert fits
        assert len(set(pages)) == count
        assert not any(self.held[page] for page in pages)
        self.held.update(pages)
        return pages

    @rule(target=users, user=users)
    def branch(self, user):
        if user and not all(self.held[page] for page in user):
            with pytest.raises(KeyError):
                self.pool.share(user)
            return []
        self.pool.share(user)
        self.held.update(user)
        return list(user)

    @rule(user=users)
    def give_back(self, user):
        if any(self.held[page] < 1 for page in user):
            with pytest.raises(KeyError):
                self.pool.drop(user)
            return
        self.pool.drop(user)
        self.held.subtract(user)
        user.clear()

    @rule(user=users, text=st.text(max_size=3))
    def write(self, user, text):
        for page in user:
            if self.held[page] == 1 and page not in self.written:
                self.pool.write(page, lambda content, text=text: setattr(content, "text", text))
                self.written[page] = text
            else:
                with pytest.raises(KeyError):
                    self.pool.write(page, lambda content: setattr(content, "text", "spoilt"))

    @rule()
    def trim(self):
        self.pool.trim()
        assert self.pool.held_bytes == self.pool.used_bytes

    @invariant()
    def counted(self):
        consistent(self.pool, self.held)

    @invariant()
    def nobody_changes_a_written_page(self):
        for page, text in self.written.items():
            if self.held[page]:
                assert self.pool.read(page).text == text


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True
)


def random_work(pool, seed, steps):
    """Take, share and give back at random, then give everything back."""
    rng, mine = random.Random(seed), []
    for _ in range(steps):
        what = rng.random()
        if what < 0.4:
            try:
                mine.append(pool.take(rng.randrange(1, 5)))
            except FrugalError:
                assert pool.held_bytes <= pool.budget
        elif what < 0.6 and mine:
            chosen = rng.choice(mine)
            pool.share(chosen)
            mine.append(chosen)
        elif mine:
            pool.drop(mine.pop(rng.randrange(len(mine))))
    for pages in mine:
        pool.drop(pages)


def test_ten_thousand_operations_leave_nothing():
    pool = PagePool(SIZE, Content, 40 * SIZE)
    random_work(pool, 1, 10_000)
    assert pool.used_bytes == 0
    assert 0 < pool.peak_bytes <= 40 * SIZE
    # All that was ever made serves again: no page is lost between sizes.
    everything = pool.held_bytes // SIZE
    made = []
    pool.make = lambda: made.append(1) or Content()
    pool.take(everything)
    assert made == []


def test_two_threads():
    pool = PagePool(SIZE, Content, 60 * SIZE)
    failures = []

    def work(seed):
        try:
            random_work(pool, seed, 3000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.used_bytes == 0


@pytest.mark.parametrize("fails_at", range(4))
def test_a_failing_allocation_takes_nothing(fails_at):
    pool = PagePool(SIZE, Content)
    pool.drop(pool.take(1))
    made = []

    def make():
        if len(made) == fails_at:
            raise MemoryError("no room")
        made.append(Content())
        return made[-1]

    pool.make = make
    if fails_at < 3:
        with pytest.raises(MemoryError):
            pool.take(4)
        assert pool.used_bytes == 0
        assert pool.held_bytes == SIZE * (1 + fails_at)
    else:
        assert len(pool.take(4)) == 4


def test_the_budget_refuses_before_anything_is_made():
    made = []
    pool = PagePool(SIZE, lambda: made.append(1), 3 * SIZE)
    with pytest.raises(FrugalError, match=r"needs .*expected at most"):
        pool.take(4)
    with pytest.raises(FrugalError):
        pool.require(4)
    assert made == []
    pool.take(2)
    with pytest.raises(FrugalError):
        pool.take(2)
    assert len(made) == 2


def test_away_pages_are_another_memory():
    pool = PagePool(SIZE, Content, 3 * SIZE)
    first, second = pool.take(2), pool.take(1)
    before = {page: pool.read(page) for page in first + second}
    pool.offload_pages(lambda content: Content())
    assert (pool.used_bytes, pool.away_bytes) == (0, 3 * SIZE)
    assert not {id(c) for c in before.values()} & {id(pool.read(page)) for page in before}
    third = pool.take(2)
    with pytest.raises(FrugalError):
        pool.fetch(first, lambda content: content)
    assert (pool.used_bytes, pool.away_bytes) == (2 * SIZE, 3 * SIZE)
    pool.drop(third[:1])
    pool.fetch(second, lambda content: before[second[0]])
    assert pool.held_bytes == pool.used_bytes == 2 * SIZE
    assert pool.read(second[0]) is before[second[0]]
    pool.drop(first + second + third[1:])
    # What was away serves nobody: only the two pages that were here are free.
    assert (pool.used_bytes, pool.away_bytes, pool.held_bytes) == (0, 0, 2 * SIZE)


def test_a_failing_move_changes_no_page():
    pool = PagePool(SIZE, Content)
    pages = pool.take(3)
    before = [pool.read(page) for page in pages]
    seen = []

    def move(content):
        seen.append(content)
        if len(seen) == 2:
            raise MemoryError("no room")
        return Content()

    with pytest.raises(MemoryError):
        pool.offload_pages(move)
    assert [pool.read(page) for page in pages] == before
    assert (pool.used_bytes, pool.away_bytes) == (3 * SIZE, 0)


def test_a_finalizer_in_the_middle_of_the_pools_work():
    pool = PagePool(SIZE, Content)
    lost, kept = pool.take(2), pool.take(1)
    pool.release_later(lost[:1])
    assert pool.used_bytes == 2 * SIZE

    done = []

    def move(content):
        if not done:
            pool.release_later(lost[1:])
            done.append(pool.refcount(lost[1]))
        return Content()

    pool.offload_pages(move)
    # Not in the middle, where pages were being counted, but as soon as it was over.
    assert done == [1]
    assert [pool.refcount(page) for page in (*lost, *kept)] == [0, 0, 1]
    assert pool.away_bytes == SIZE
