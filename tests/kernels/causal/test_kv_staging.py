"""The next layer's pages are asked for before this layer's are read, and are the same to the bit
whenever the copies are really done.
"""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.staging import Lane, Staging
from frugal.kernels.causal.storage import Page, PageFormat
from frugal.kernels.causal.strategies import CHUNKED, GATHERED

B, TOKENS, HEADS, WIDTH, LAYERS = 1, 3, 2, 12, 4
SHAPE = (B, TOKENS, HEADS, WIDTH)


class LateLane(Lane):
    """A device whose copies are done at the last moment: when something waits for them, or when
    their place is asked for again. `log` tells what happened in which order.
    """

    def __init__(self):
        self.log, self.queue, self.marks = [], [], 0

    def order(self, after):
        self.log.append(("order", after))
        # Copies are in the queue of one stream: they stay in order.
        self.queue.append([])

    def copy(self, out, tensor):
        self.queue[-1].append((out, tensor))

    def done(self):
        self.marks += 1
        self.queue[-1].append(self.marks)
        self.log.append(("asked", self.marks))
        return self.marks

    def wait(self, mark):
        self.log.append(("waited", mark))
        while self.queue and self.queue[0][-1] <= mark:
            for out, tensor in self.queue.pop(0)[:-1]:
                out.copy_(tensor)

    def read(self):
        self.marks += 1
        self.log.append(("read", self.marks))
        return self.marks


def kv(seed):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(*SHAPE, generator=make) for _ in range(2)]


def film(lane=None, blocks=6, calls=3, sides=((0,),), **options):
    """What every attention call of a video saw; calls per block, each side's in turn."""
    options = {"window": 3, "sink": 1, "relative": True, "on_host": True, **options}
    fmt = PageFormat(SHAPE, torch.float32, options.get("kind", "model"))
    cache = VideoCache(fmt, LAYERS, torch.device("cpu"), CacheOptions(**options))
    if lane is not None:
        cache.staging = Staging(fmt, torch.device("cpu"), lane)
    seen = []

    def call(block, number):
        for streams in sides:
            for layer in range(LAYERS):
                each = [kv(1000 * block + 10 * layer + side + 100 * number) for side in streams]
                k, v = (torch.cat(part) for part in zip(*each, strict=True))
                cache.store(layer, streams, k, v)
                if options.get("way") == CHUNKED:
                    parts = list(cache.runs(layer, streams, k, v, 2))
                    seen.append(tuple(torch.cat(x, 1) for x in zip(*parts, strict=True)))
                else:
                    seen.append(cache.gathered(layer, streams, k, v))

    for block in range(blocks):
        cache.start_block(1)
        for number in range(calls):
            call(block, number)
        with cache.writing(torch.zeros(B, 1, 1, 1, 1)):
            call(block, calls)
    return cache, seen


def same(one, other):
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("way", [GATHERED, CHUNKED])
@pytest.mark.parametrize("kind", ["model", "int8"])
@pytest.mark.parametrize("sides", [((0,),), ((0, 1),), ((1,), (0,))])
def test_what_attention_sees_is_as_without(way, kind, sides):
    wanted = film(on_host=False, way=way, kind=kind, sides=sides)[1]
    assert same(film(way=way, kind=kind, sides=sides)[1], wanted)
    lane = LateLane()
    cache, seen = film(lane, way=way, kind=kind, sides=sides)
    assert same(seen, wanted)
    assert cache.staging.ahead + cache.staging.late == 5 * 4 * len(sides) * LAYERS
    # Late is the first layer of each block, whose frames no call before it had, and what the turn
    # of the sides had to teach.
    assert cache.staging.late == 5 + (2 if len(sides) == 2 else 0)


def test_the_next_layer_is_asked_for_before_this_one_is_read():
    lane = LateLane()
    film(lane, blocks=3)
    kinds = [what for what, _ in lane.log]
    waits = [at for at, what in enumerate(kinds) if what == "waited"]
    assert len(waits) == 2 * 4 * LAYERS
    for number, at in enumerate(waits):
        mark = lane.log[at][1]
        # Its own copies were asked for one layer before, but for the first of a block.
        asked = lane.log.index(("asked", mark))
        earlier = waits[number - 1] if number else -1
        assert asked < earlier or number % (4 * LAYERS) == 0
        # The next layer's are behind those of this one and before the wait; the last call of a
        # block has no next.
        later = [m for what, m in lane.log[:at] if what == "asked" and m > mark]
        assert len(later) == (0 if number % (4 * LAYERS) == 4 * LAYERS - 1 else 1)
        assert kinds[at + 1] == "read"


def test_a_place_is_filled_again_only_behind_what_read_it():
    lane = LateLane()
    film(lane, blocks=4)
    reads = [mark for what, mark in lane.log if what == "read"]
    orders = [after for what, after in lane.log if what == "order"]
    # None: new memory, which waits for everything; it grows with the frames in the window.
    assert orders[:2] == [None, None]
    behind = [after for after in orders if after is not None]
    assert behind and all(after in reads for after in behind)
    assert behind == sorted(behind)


def test_a_place_that_is_read_too_late_would_be_seen():
    """The test itself: without waiting, the late lane gives other numbers."""

    class Careless(LateLane):
        def wait(self, mark):
            pass

    assert not same(film(Careless())[1], film()[1])


def test_bytes_are_counted_and_given_back():
    cache, _ = film()
    staging, page = cache.staging, cache.fmt.page_bytes
    # Two layers of the three frames before a block: one sink, and the window without the block.
    assert staging.held_bytes == staging.peak_bytes == 2 * 3 * page
    cache.offload()
    assert (staging.held_bytes, staging.peak_bytes) == (0, 2 * 3 * page)
    assert film(on_host=False)[0].staging is None


def test_a_failing_copy_leaves_no_page_under_a_wrong_name():
    staging = Staging(PageFormat(SHAPE, torch.float32), torch.device("cpu"))
    pages = {number: Page(*kv(number)) for number in range(4)}

    def broken(number):
        if number == 3:
            raise MemoryError("no room")
        return pages[number]

    with pytest.raises(MemoryError):
        staging.turn((0, 1), (2, 3), broken)
    for numbers in ((2, 3), (0, 1)):
        found = staging.turn(numbers, (), pages.__getitem__)
        assert all(torch.equal(found[n].k, pages[n].k) for n in numbers)
